"""Megatron's ``torch_dist`` format, read and written part by part without a model."""
