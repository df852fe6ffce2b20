"""Measured rates of kernels and collectives."""
