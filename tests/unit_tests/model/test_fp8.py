"""FP8 flags over GPUs: Megatron's validator takes them, or ours names the recipes that run."""

import copy
import itertools
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest
from packaging.version import Version

from tests.functional_tests.launch import sampled
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.model.fp8 import FP8_RECIPES, check_fp8, fp8_defaults, supported_recipes

# What each GPU runs with CUDA 13.  Source: NVIDIA, Transformer Engine's user guide, "Low precision
# training": FP8 from Ada on, blockwise from Hopper on, MXFP8 on data-centre Blackwell.
ALL_GPUS = {
    "A100": ((8, 0), ()),
    "L40S (Ada)": ((8, 9), ("tensorwise", "delayed")),
    "H100 and H200 (Hopper)": ((9, 0), ("blockwise", "tensorwise", "delayed")),
    "B200": ((10, 0), ("mxfp8", "blockwise", "tensorwise", "delayed")),
    "B300": ((10, 3), ("mxfp8", "blockwise", "tensorwise", "delayed")),
    "RTX PRO 6000 (consumer Blackwell)": ((12, 0), ("blockwise", "tensorwise", "delayed")),
}
GPUS = sampled(ALL_GPUS, "A100", "H100 and H200 (Hopper)", "B300")
MEGATRON_RECIPES = ("tensorwise", "delayed", "mxfp8", "blockwise", "custom")
FURTHER_FLAGS = (
    "",
    "--first-last-layers-bf16",
    "--num-layers-at-start-in-bf16 0 --num-layers-at-end-in-bf16 2",
    "--fp8-param-gather --use-distributed-optimizer",
    "--reuse-grad-buf-for-mxfp8-param-ag",
    "--fp8-output-proj",
    "--moe-router-padding-for-quantization",
    "--moe-router-padding-for-fp8",
    "--fp8-amax-history-len 16 --fp8-amax-compute-algo max --fp8-margin 1",
    "--no-fp8-wgrad",
    "--pipeline-model-parallel-size 2",
    "--tensor-model-parallel-size 2 --sequence-parallel",
    "--transformer-impl local",
)
NEVER_ACCEPTED = {
    flags
    for flags in FURTHER_FLAGS
    if any(
        word in flags
        for word in ("param-gather", "param-ag", "output-proj", "padding", "local", "wgrad")
    )
}


@pytest.fixture(scope="module")
def megatron() -> Any:
    """Megatron's argument module, on any machine."""
    enter_host()
    from megatron.training import arguments

    return arguments


def parse(flags: str, megatron: Any, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Arguments as on a GPU host, complete but not validated."""
    from trinity_megatron.training.arguments.parser import add_trinity_args

    monkeypatch.setattr(sys, "argv", ["train", "--bf16", *flags.split()])
    monkeypatch.setenv("WORLD_SIZE", "2")

    def provide(parser: Any) -> Any:
        parser = add_trinity_args(parser)
        parser.set_defaults(fp8_recipe=None, transformer_impl="transformer_engine")
        return parser

    return megatron.parse_args(extra_args_provider=provide)


@pytest.fixture(scope="module")
def parsed_flags(megatron: Any) -> Iterator[list[Namespace]]:
    """The arguments of FURTHER_FLAGS, parsed once (Megatron's parser takes 0.15 s)."""
    with pytest.MonkeyPatch.context() as patch:
        parsed = []
        for further in FURTHER_FLAGS:
            base = "--fp8-format hybrid --fp8-recipe tensorwise --micro-batch-size 4"
            parsed.append(parse(f"{base} {further}", megatron, patch))
            parsed[-1].further = further
        yield parsed


def megatron_accepts(args: Namespace, megatron: Any) -> None:
    """Megatron's own checks: of the arguments, and of the config that they become."""
    from trinity_megatron.training.arguments.trinity_config import trinity_config_from_args

    args.padded_vocab_size = args.vocab_size or 4096
    megatron.validate_args(args, {})
    config = trinity_config_from_args(args)
    assert config.fp8 == args.fp8
    assert config.fp8_recipe == args.fp8_recipe


@pytest.mark.parametrize("gpu", GPUS)
def test_every_combination_is_accepted_or_refused_with_what_runs(
    gpu: str, parsed_flags: list[Namespace], megatron: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusals are ours and name every recipe of the GPU; what passes, Megatron takes."""
    from megatron.core import utils

    # What Megatron would see where Transformer Engine is installed.
    monkeypatch.setattr(utils, "_te_version", Version("2.20.2"))
    capability, recipes = GPUS[gpu]
    accepted = set()
    for parsed, form, recipe in itertools.product(
        parsed_flags, ("e4m3", "hybrid"), MEGATRON_RECIPES
    ):
        args, further = copy.copy(parsed), parsed.further
        args.fp8, args.fp8_recipe = form, recipe
        fp8_defaults(args, capability)
        try:
            check_fp8(args, capability)
        except ValueError as error:
            message = str(error)
            assert "Remedy: " in message, message
            if further not in NEVER_ACCEPTED:
                named = [name for name in FP8_RECIPES if name in message.partition("Remedy: ")[2]]
                expected = [name for name in recipes if name != recipe]
                assert named == expected, message
                assert recipe not in recipes or "--first-last-layers-bf16" in further, message
            continue
        assert recipe in recipes
        assert further not in NEVER_ACCEPTED
        megatron_accepts(args, megatron)
        accepted.add((form, recipe, further))
    # Every recipe of the GPU is usable as it is, in both formats.
    assert {(form, recipe) for form, recipe, further in accepted if not further} == set(
        itertools.product(("e4m3", "hybrid"), recipes)
    )
    kept = len(FURTHER_FLAGS) - len(NEVER_ACCEPTED)
    assert len(accepted) == 2 * (kept * len(recipes) - ("delayed" in recipes))


@pytest.mark.parametrize("gpu", GPUS)
def test_supported_recipes(gpu: str) -> None:
    capability, recipes = GPUS[gpu]
    assert supported_recipes(capability) == recipes


def test_an_older_cuda_has_no_blocks() -> None:
    assert supported_recipes((9, 0), cuda=(12, 8)) == ("tensorwise", "delayed")
    assert supported_recipes((9, 0), cuda=(12, 9)) == ("blockwise", "tensorwise", "delayed")


@pytest.mark.parametrize(
    ("capability", "recipe"),
    [((8, 9), "tensorwise"), ((9, 0), "blockwise"), ((10, 0), "mxfp8"), ((10, 3), "mxfp8")],
)
def test_defaults_take_the_best_recipe_and_leave_both_ends_in_bf16(
    capability: tuple[int, int],
    recipe: str,
    megatron: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = parse("--fp8-format e4m3 --num-layers-at-end-in-bf16 2", megatron, monkeypatch)
    line = fp8_defaults(args, capability)
    check_fp8(args, capability)
    assert args.fp8_recipe == recipe
    assert args.first_last_layers_bf16
    assert line is not None
    assert recipe in line
    assert "first 1 and the last 2 layers" in line


def test_without_fp8_nothing_is_said_or_refused(
    megatron: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parse("", megatron, monkeypatch)
    assert fp8_defaults(args, (8, 0)) is None
    check_fp8(args, (8, 0))
    check_fp8(args, None)
    assert not args.first_last_layers_bf16
    assert args.fp8_recipe == "delayed"  # as Megatron has it without FP8


def test_a_recipe_without_fp8_is_refused(megatron: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse("--fp8-recipe mxfp8", megatron, monkeypatch)
    with pytest.raises(ValueError, match="--fp8-recipe mxfp8 without --fp8-format"):
        fp8_defaults(args, (10, 0))


def test_bf16_layers_must_leave_some_in_fp8(megatron: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse("--fp8-format e4m3 --num-layers-at-end-in-bf16 3", megatron, monkeypatch)
    fp8_defaults(args, (9, 0))
    with pytest.raises(ValueError, match="leave none of --num-layers 4 in FP8"):
        check_fp8(args, (9, 0))


def test_fp4_is_refused_with_the_recipes(megatron: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse("--fp4-format e2m1", megatron, monkeypatch)
    with pytest.raises(ValueError, match=r"--fp4-format e2m1.*mxfp8 or blockwise"):
        check_fp8(args, (10, 0))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--moe-ffn-hidden-size 72", "--moe-ffn-hidden-size is 72"),
        ("--ffn-hidden-size 776", "--ffn-hidden-size is 776"),
        ("--hidden-size 264", "--hidden-size is 264"),
        ("--micro-batch-size 1 --seq-length 500", "--micro-batch-size x --seq-length is 500"),
    ],
)
def test_a_size_that_does_not_fit_the_blocks(
    flags: str, named: str, megatron: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parse(f"--fp8-format e4m3 {flags}", megatron, monkeypatch)
    fp8_defaults(args, (10, 0))
    with pytest.raises(ValueError, match=f"{named}.*multiple of 32"):
        check_fp8(args, (10, 0))


@pytest.mark.parametrize("preset", ["tiny", "nano", "mini", "large"])
@pytest.mark.parametrize("gpu", [gpu for gpu, (_, recipes) in GPUS.items() if recipes])
def test_every_preset_fits_every_recipe(
    preset: str, gpu: str, megatron: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability, recipes = GPUS[gpu]
    for recipe in recipes:
        flags = f"--preset {preset} --fp8-format hybrid --fp8-recipe {recipe}"
        args = parse(flags, megatron, monkeypatch)
        fp8_defaults(args, capability)
        check_fp8(args, capability)


@pytest.mark.te
@pytest.mark.parametrize("gpu", [gpu for gpu, (_, recipes) in GPUS.items() if recipes])
def test_table_equals_transformer_engine(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's own judgement of a GPU, with its compute capability put in."""
    pytest.importorskip("transformer_engine.pytorch")
    from transformer_engine.common import recipe as te_recipe
    from transformer_engine.pytorch import quantization

    capability, recipes = GPUS[gpu]
    monkeypatch.setattr(quantization, "get_device_compute_capability", lambda: capability)
    supports = {
        "mxfp8": quantization._compute_mxfp8_support,
        "blockwise": quantization._compute_fp8_block_scaling_support,
        "tensorwise": quantization._compute_fp8_support,
        "delayed": quantization._compute_fp8_support,
    }
    assert recipes == tuple(name for name in FP8_RECIPES if supports[name]()[0])
    classes = {
        "mxfp8": te_recipe.MXFP8BlockScaling,
        "blockwise": te_recipe.Float8BlockScaling,
        "tensorwise": te_recipe.Float8CurrentScaling,
        "delayed": te_recipe.DelayedScaling,
    }
    for name, make in classes.items():
        size = quantization.get_align_size_for_quantization(make())
        assert FP8_RECIPES[name].multiple == size


DELAYED = {"fp8": "hybrid", "fp8_recipe": "delayed"}
BLOCKWISE = {"fp8": "hybrid", "fp8_recipe": "blockwise"}
BF16 = {"fp8": None, "fp8_recipe": "delayed"}


@pytest.mark.parametrize(
    ("saved", "started", "allowed", "refused"),
    [
        (BF16, DELAYED, "1", "Remedy: --fp8-recipe tensorwise"),
        (BLOCKWISE, DELAYED, "1", "Remedy: --fp8-recipe tensorwise"),
        ({}, DELAYED, "1", "Remedy: --fp8-recipe tensorwise"),  # converted from Hugging Face
        (DELAYED, BF16, "1", "Remedy: --fp8-format hybrid --fp8-recipe delayed"),
        (DELAYED, BLOCKWISE, "1", "Remedy: --fp8-format hybrid --fp8-recipe delayed"),
        (DELAYED, DELAYED, "0", "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1"),
        ({**DELAYED, "expert_model_parallel_size": 4}, DELAYED, "1", "parallel-size 4"),
        (DELAYED, DELAYED, "1", ""),
        (BF16, BLOCKWISE, "0", ""),
        (BLOCKWISE, BF16, "0", ""),
    ],
)
def test_delayed_scaling_keeps_to_its_own_checkpoints(
    saved: dict[str, Any],
    started: dict[str, Any],
    allowed: str,
    refused: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trinity_megatron.training.resume import check_delayed_scales

    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", allowed)
    sizes = {"expert_model_parallel_size": 2}
    before, args = Namespace(**{**sizes, **saved}), Namespace(**sizes, **started)
    if refused:
        with pytest.raises(ValueError, match=f"--load X.*{refused}"):
            check_delayed_scales(before, args, flag="--load X")
    else:
        check_delayed_scales(before, args, flag="--load X")
