"""Attention with a window on local layers, without RoPE on global ones."""
