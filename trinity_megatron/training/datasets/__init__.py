"""Megatron's datasets: order, cache, splits and identity of the data."""
