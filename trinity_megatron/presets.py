"""Public name of ``trinity_megatron.model.presets``, kept for scripts."""

from trinity_megatron.model.presets import *  # noqa: F403
