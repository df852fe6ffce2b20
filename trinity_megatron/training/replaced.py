"""Kept for the modules of this folder; see :mod:`trinity_megatron.replaced`."""

from trinity_megatron.replaced import replaced

__all__ = ("replaced",)
