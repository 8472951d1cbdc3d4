"""The fleet: a matrix of models, targets and latencies, built by several processes or machines.

`matrix` reads what is asked for and makes jobs of it, `schedule` decides what runs where, `local` and `cluster` are the
engines that run it, `job` is the process in which one job runs, `sweep` gathers the artifacts and compares them.
"""
