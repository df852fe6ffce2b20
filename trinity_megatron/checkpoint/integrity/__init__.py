"""Checksums of checkpoints, and reading them without running code."""
