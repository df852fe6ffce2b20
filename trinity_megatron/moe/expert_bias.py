"""Public name of ``trinity_megatron.model.moe.expert_bias``, kept for scripts."""

from trinity_megatron.model.moe.expert_bias import *  # noqa: F403
