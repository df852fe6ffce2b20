"""Megatron's arguments with Trinity's flags, defaults and checks."""
