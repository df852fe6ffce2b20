"""The flags of this package: made from dataclasses, with their names, defaults and help."""

import argparse
from dataclasses import fields
from typing import Any

import pytest

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from megatron.training.arguments import add_megatron_arguments  # noqa: E402

from trinity_megatron.model.config import FLAG_FIELDS, TrinityConfig  # noqa: E402
from trinity_megatron.training.arguments.parser import add_trinity_args  # noqa: E402
from trinity_megatron.training.arguments.run_config import RunConfig  # noqa: E402

RUN_FLAGS = (
    "--preset",
    "--data",
    "--out",
    "--keep-last",
    "--branch-from",
    "--branch-step",
    "--anneal-tokens",
    "--anneal-style",
    "--keep-every",
    "--skip-spikes",
    "--spike-window",
    "--rewind-on-spike",
    "--on-damage",
    "--on-failed-save",
    "--check-replicas",
    "--evaluate-every",
    "--evaluate-tasks",
    "--evaluate-data",
    "--evaluate-limit",
    "--hang-seconds",
    "--allow-data-change",
    "--refuse-long-conversations",
    "--allow-upstream-changes",
    "--no-verify-checksums",
    "--muon-momentum-dtype",
)
MODEL_FLAGS = (
    "--num-dense-layers",
    "--global-attn-every-n-layers",
    "--no-scale-embeddings",
    "--moe-router-bias-update-rule",
    "--moe-router-bias-momentum",
    "--moe-router-bias-clamp-scale",
    "--moe-router-bias-warmup-steps",
    "--moe-router-bias-freeze-step",
    "--lm-head-z-loss-coeff",
)


@pytest.fixture(scope="module")
def megatron_dests() -> set[str]:
    """Arguments of Megatron's own parser."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return {action.dest for action in parser._actions}


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser of a run whose command line is empty."""
    monkeypatch.setattr("sys.argv", ["pretrain"])
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return add_trinity_args(parser)


def actions_of(parser: argparse.ArgumentParser, title: str) -> list[argparse.Action]:
    (group,) = (group for group in parser._action_groups if group.title == title)
    return group._group_actions


@pytest.mark.parametrize(
    ("title", "flags"), [("trinity run", RUN_FLAGS), ("trinity model", MODEL_FLAGS)]
)
def test_names_and_help(
    title: str, flags: tuple[str, ...], parser: argparse.ArgumentParser
) -> None:
    actions = actions_of(parser, title)
    # No further spelling, as the --disable-* that Megatron's factory makes of a field that is True.
    assert [action.option_strings for action in actions] == [[flag] for flag in flags]
    assert all(action.help for action in actions)


def test_defaults_of_the_run(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args([])
    assert {f.name: getattr(args, f.name) for f in fields(RunConfig)} == vars(RunConfig())


def test_every_own_field_of_the_model_has_a_flag_or_another_source(
    megatron_dests: set[str],
) -> None:
    (base,) = TrinityConfig.__bases__
    own = {f.name for f in fields(TrinityConfig)} - {f.name for f in fields(base)}
    # Set by trinity_config_from_args and by set_vocab_size.
    assert own - megatron_dests - set(FLAG_FIELDS) == {
        "init_seed",
        "set_matrices_aside",  # of how a run is built, not of the model
        "tokenizer_vocab_size",
    }
    assert not megatron_dests & set(FLAG_FIELDS)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--no-scale-embeddings"], {"scale_embeddings": False}),
        (["--no-verify-checksums"], {"verify_checksums": False}),
        (["--allow-data-change", "--keep-last", "2"], {"allow_data_change": True, "keep_last": 2}),
        (["--moe-router-bias-update-rule", "sign"], {"moe_router_bias_update_rule": "sign"}),
        (["--moe-router-bias-momentum", "0.25"], {"moe_router_bias_momentum": 0.25}),
        (["--moe-router-bias-freeze-step", "9"], {"moe_router_bias_freeze_step": 9}),
        (["--muon-momentum-dtype", "bf16"], {"muon_momentum_dtype": "bf16"}),
        ([], {"num_dense_layers": 1, "scale_embeddings": True, "moe_router_bias_momentum": None}),
    ],
)
def test_values(
    flags: list[str], expected: dict[str, Any], parser: argparse.ArgumentParser
) -> None:
    args = parser.parse_args(flags)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--moe-router-bias-update-rule", "tanh"], ("--moe-router-bias-update-rule", "'tanh'")),
        (["--muon-momentum-dtype", "fp8"], ("--muon-momentum-dtype", "'fp8'", "bf16")),
        (["--num-dense-layers", "two"], ("--num-dense-layers", "'two'")),
    ],
)
def test_a_wrong_value_is_refused(
    flags: list[str], words: tuple[str, ...], parser: argparse.ArgumentParser
) -> None:
    with pytest.raises(ValueError, match="Remedy: ") as error:
        parser.parse_args(flags)
    assert all(word in str(error.value) for word in words)
