"""Tuning: how a pruned model learns from the dense one, and a card from its labels.

`loop.fit` is the loop; `loss` says what it minimises, `lessons` what it sees, `judge` how good the model is on
images kept out of tuning, `precision` and `group` what it runs on. `launch` runs it in several processes.
"""
