"""Arithmetic of a run: memory, FLOPs, the work of Muon."""
