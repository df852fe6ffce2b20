"""Arguments -> Megatron's model configuration."""

import argparse
from dataclasses import dataclass
from typing import Any

from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig

from trinity_megatron.training.arguments.trinity_config import trinity_config_from_args


@dataclass(kw_only=True)
class TrinityModelConfig(GPTModelConfig):
    """Megatron's model configuration around a ``TrinityConfig``; built by Megatron's builder."""

    def __setattr__(self, name: str, value: Any, /) -> None:
        """Keep here too what both configs have: Megatron sets only the inner one then."""
        if name in ("vocab_size", "rotary_base"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


def model_config_from_args(args: argparse.Namespace) -> TrinityModelConfig:
    """The model that ``pretrain()`` builds.

    Raises:
        ValueError: Fields contradict each other.
    """
    config = gpt_config_from_args(args, trinity_config_from_args(args), TrinityModelConfig)
    config.rope_scaling_factor = args.rope_scaling_factor  # Megatron 0.19 leaves it at its default
    return config
