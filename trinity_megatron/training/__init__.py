"""The only folder that imports ``megatron.training``."""
