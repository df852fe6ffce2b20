"""The command line, ``trinity-megatron``."""
