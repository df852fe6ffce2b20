"""Public name of ``trinity_megatron.model.hf_config``, kept for scripts."""

from trinity_megatron.model.hf_config import *  # noqa: F403
