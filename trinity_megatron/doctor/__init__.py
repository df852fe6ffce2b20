"""``trinity-megatron doctor`` and ``gpu-check``: checks of a machine and of its GPU path."""
