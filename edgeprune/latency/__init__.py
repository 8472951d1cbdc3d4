"""Measured latency: the device, the worker that times, the clock that asks it, and the table.

Nothing here knows torch or what a Vision Transformer is. Import the module you need.
"""
