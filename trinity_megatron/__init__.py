"""Pretrain Arcee's Trinity (AFMoE) models with NVIDIA Megatron-Core."""

__version__ = "0.1.0"
