"""Muon for Megatron: orthogonalization, the optimizer, its parameter table and its registration."""
