"""Arguments to ``TrinityConfig``."""

from __future__ import annotations

import argparse

from megatron.training.argument_utils import core_transformer_config_from_args

from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.training.arguments.parser_errors import megatron_refusals


def trinity_config_from_args(args: argparse.Namespace) -> TrinityConfig:
    """The one place where arguments become a :class:`TrinityConfig`.

    Raises:
        UserError: Fields contradict each other.
    """
    given = argparse.Namespace(**vars(args))
    given.vocab_size = args.padded_vocab_size or args.vocab_size
    given.init_seed = args.seed
    with megatron_refusals():
        config = core_transformer_config_from_args(given, TrinityConfig)
    assert isinstance(config, TrinityConfig)
    return config
