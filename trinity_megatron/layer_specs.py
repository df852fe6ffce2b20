"""Public name of ``trinity_megatron.model.layer_specs``, for Megatron's ``--spec``."""

from trinity_megatron.model.layer_specs import get_trinity_layer_spec

__all__ = ["get_trinity_layer_spec"]
