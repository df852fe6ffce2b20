"""Arguments -> ``TrinityConfig``: Megatron's own parser, with a preset's values as defaults."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import linecache
import logging
import math
import os
import re
import traceback
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.package_info import __version__ as megatron_version
from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
from megatron.training import global_vars
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.utils import print_rank_0

from trinity_megatron.cpu_host.cuda_stand_ins import is_cpu_host
from trinity_megatron.data.manifest import DataManifest, load_manifest
from trinity_megatron.errors import UserError
from trinity_megatron.model.config import (
    ARGUMENT_DEST,
    TRINITY_ARCHITECTURE,
    TrinityConfig,
    flag_of,
)
from trinity_megatron.model.fp8 import check_fp8, fp8_defaults
from trinity_megatron.model.moe.expert_bias import BIAS_RULES
from trinity_megatron.model.presets import PRESETS, Preset, get_preset
from trinity_megatron.optimizer.register import (
    MOMENTUM_DTYPES,
    MUON_ARGUMENT_DEFAULTS,
    finish_muon_arguments,
    validate_muon_arguments,
)
from trinity_megatron.training.arguments.schedule import fit_schedule
from trinity_megatron.training.arguments.unsupported import refuse_flags, refuse_host
from trinity_megatron.training.arguments.value_ranges import check_keep_last, check_values
from trinity_megatron.training.datasets.data_identity import read_identity
from trinity_megatron.training.resume import check_start, resumed_samples
from trinity_megatron.training.run_writer import opened_later

SUPPORTED_MEGATRON = ((0, 19, 2), (0, 20, 0))


def check_megatron_version(version: str = megatron_version) -> None:
    """Refuse a Megatron-Core outside the range that was run.

    Raises:
        UserError: With the version found, the range and the remedy.
    """
    numbers = tuple(int(part) for part in version.split("+")[0].split("rc")[0].split(".")[:3])
    low, high = SUPPORTED_MEGATRON
    if not low <= numbers < high:
        raise UserError(
            f"megatron-core {version} is installed, but trinity_megatron was built on and tested "
            "with 0.19.2 <= version < 0.20 (Megatron changes the signature of pretrain() between "
            "minor versions). Remedy: pip install 'megatron-core[training]>=0.19.2,<0.20'."
        )


def parse_trinity_args(
    on_checked: Callable[[argparse.Namespace], object] | None = None,
) -> argparse.Namespace:
    """Parse ``sys.argv`` with Megatron's parser and ours, check, and set Megatron's globals.

    Args:
        on_checked: Called with the arguments when they are right and nothing is written yet.

    Raises:
        UserError: An argument is wrong; names field, value and remedy.
        FileNotFoundError: The data folder is missing.
    """
    check_megatron_version()
    parsers: list[argparse.ArgumentParser] = []

    def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parsers.append(parser)
        return add_trinity_args(parser)

    args = parse_args(extra_args_provider=add_args)
    refuse_flags(args, parsers[0])
    manifest = load_manifest(Path(args.data)) if args.data else None
    check_args(args, manifest)
    if on_checked:
        on_checked(args)
    with _argument_dump(args), megatron_refusals():
        validate_args(args, {"tokenizer_type": "HuggingFaceTokenizer"})
    finish_muon_arguments(args)
    rows = args.padded_vocab_size
    with opened_later():
        global_vars.set_global_variables(args)
    _set_vocab_size(args, manifest, rows)
    return args


def _set_vocab_size(
    args: argparse.Namespace, manifest: DataManifest | None, rows: int | None
) -> None:
    """Have a row for every token, and remember how many rows a token has.

    Megatron pads the number of tokens, but an id may be beyond it where the vocabulary has gaps.

    Args:
        args: Of the run; its tokenizer is built.
        manifest: Of ``--data``.
        rows: ``--padded-vocab-size``, also by ``--preset DIR``; None if Megatron chose it.

    Raises:
        UserError: There are more tokens than rows.
    """
    in_data = manifest.vocab_size if manifest is not None else 0
    args.tokenizer_vocab_size = max(global_vars.get_tokenizer().vocab_size, in_data)
    if args.tokenizer_vocab_size <= (args.padded_vocab_size or math.inf):
        return
    if rows is not None:
        raise UserError(
            f"--padded-vocab-size {rows} has no row for each of the {args.tokenizer_vocab_size} "
            "tokens of the tokenizer. Remedy: drop the flag, or take the tokenizer of --preset DIR."
        )
    args.padded_vocab_size = vocab_size_with_padding(args.tokenizer_vocab_size, args)


@contextlib.contextmanager
def megatron_refusals(
    kinds: tuple[type[Exception], ...] = (AssertionError, RuntimeError, ValueError),
    has_begun: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Say in one sentence what Megatron's checks of arguments and configuration refuse.

    Args:
        kinds: Exceptions of Megatron's own that refuse an argument here.
        has_begun: Whether the steps have begun: an exception is a bug from then on, and keeps its
            trace.

    Raises:
        UserError: Megatron's message, or the check itself where it has none; names the flags.
    """
    try:
        yield
    except kinds as error:
        message = str(error)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        is_ours = isinstance(error, UserError)
        if is_ours or has_begun() or "megatron" not in Path(frame.filename).parts:
            raise
        checked = "" if message else _statement_of(frame)
        message = " ".join(message.split()).rstrip(".") or f"it is not so that {checked}"
        flags = [flag_of(name) for name in re.findall(r"args\.(\w+)", checked)]
        what = f"see {', '.join(dict.fromkeys(flags))}" if flags else "change what it names"
        raise UserError(f"Megatron refuses the arguments: {message}. Remedy: {what}.") from error


def _statement_of(frame: traceback.FrameSummary) -> str:
    """The condition of the ``assert`` that failed, which may have several lines."""
    first, last = frame.lineno or 0, frame.end_lineno or frame.lineno or 0
    lines = [linecache.getline(frame.filename, number) for number in range(first, last + 1)]
    return " ".join(" ".join(lines).split()).removeprefix("assert ")


@contextlib.contextmanager
def _argument_dump(args: argparse.Namespace) -> Iterator[None]:
    """Send Megatron's list of some 900 arguments to a file of the run instead of the screen."""
    if not args.out or args.rank != 0:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()) as listing:
        yield  # a refusal leaves the list of the run as it is
    path = Path(args.out) / "arguments.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(listing.getvalue(), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        print(f"> {path} is not written: {error.strerror}")


def add_trinity_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags; let ``--preset``, ``--data``, ``--out`` and the host set the defaults."""
    _speak_plainly(parser)
    group = parser.add_argument_group(title="trinity")
    known = ", ".join(f"{name}: {preset.description}" for name, preset in PRESETS.items())
    group.add_argument(
        "--preset",
        default="tiny",
        help=f"Model and recipe. {known}; or the folder of a Hugging Face checkpoint.",
    )
    group.add_argument("--data", help="Folder made by trinity-megatron prepare-data.")
    group.add_argument("--out", help="Folder of the run: checkpoints, logs, pictures.")
    group.add_argument(
        "--allow-data-change",
        action="store_true",
        help="Resume with other training data than those of the checkpoint.",
    )
    group.add_argument(
        "--num-dense-layers", type=int, help="Leading layers with a dense MLP instead of experts."
    )
    group.add_argument(
        "--global-attn-every-n-layers",
        type=int,
        default=4,
        help="Every n-th layer attends globally and without RoPE.",
    )
    group.add_argument(
        "--no-scale-embeddings",
        action="store_false",
        dest="scale_embeddings",
        help="Do not multiply the embedding by the square root of the hidden size.",
    )
    group.add_argument(
        "--keep-last",
        type=int,
        metavar="N",
        help="Keep the newest N complete checkpoints in --save and delete older ones after each "
        "save; multiples of --save-retain-interval are kept too.  Default: keep all.",
    )
    _add_balance_args(group)
    group.add_argument(
        "--lm-head-z-loss-coeff",
        type=float,
        default=0.0,
        help="Coefficient of the mean squared logsumexp of the LM head's logits; 0: off.",
    )
    group.add_argument(
        "--allow-upstream-changes",
        action="store_true",
        help="Train although the installed Megatron-Core differs in what this package replaces.",
    )
    group.add_argument(
        "--no-verify-checksums",
        action="store_false",
        dest="verify_checksums",
        help="Load a checkpoint without comparing the checksums that it was saved with.",
    )
    given, _ = _first_parser().parse_known_args()
    # What Megatron's parse_args() acts on by itself.
    early = argparse.Namespace(yaml_cfg=given.yaml_cfg, enable_msc=given.enable_msc)
    refuse_flags(early, parser)
    defaults = default_arguments(get_preset(given.preset), given.data, given.out)
    if given.optimizer not in (None, "muon"):  # one optimizer, one rate: that of AdamW
        for name in ("lr", "min_lr"):
            defaults[name] = defaults.pop(f"decoupled_{name}")
    if any(getattr(given, name) is not None for name in _OTHER_DATA):
        defaults.pop("train_data_path", None)
        defaults.pop("valid_data_path", None)
    # Megatron takes one of each pair only, and a default for a wish.
    defaults["override_opt_param_scheduler"] = not given.use_checkpoint_opt_param_scheduler
    for name, other in _INSTEAD.items():
        if getattr(given, name) is not None:
            defaults.pop(other, None)
    parser.set_defaults(**defaults)
    return parser


def _speak_plainly(parser: argparse.ArgumentParser) -> None:
    """Let a wrong flag end in a line with those that are like it, without 700 lines of usage."""

    def say(message: str) -> NoReturn:
        if message.startswith("argument "):  # it names flag and value
            raise UserError(f"{message}. Remedy: give another value; --help lists all flags.")
        unknown = message.removeprefix("unrecognized arguments: ").split()
        flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        close = [name for word in unknown for name in get_close_matches(word, flags, n=2)]
        advice = f"did you mean {' or '.join(close)}?" if close else "--help lists all flags"
        raise UserError(f"{message}. Remedy: {advice}")

    parser.error = say  # type: ignore[method-assign]
    for action in parser._actions:
        if callable(action.type) and action.type not in (int, float, str, bool):
            action.type = _named_errors(action.type, action.choices)
        try:
            (action.help or "") % vars(action)
        except ValueError:  # a bare % in Megatron 0.19
            action.help = (action.help or "").replace("%", "%%")


def _named_errors(convert: Callable[[str], Any], choices: Any) -> Callable[[str], Any]:
    """Let argparse name the flag whatever a converter of Megatron's raises, e.g. a KeyError."""

    def wrapper(text: str) -> Any:
        try:
            return convert(text)
        except Exception as error:
            known = [str(getattr(choice, "name", choice)) for choice in choices or ()]
            advice = f"; choose from {', '.join(known)}" if known else ""
            raise argparse.ArgumentTypeError(f"invalid value {text!r}{advice}") from error

    return wrapper


def _add_balance_args(group: Any) -> None:
    group.add_argument(
        "--moe-router-bias-update-rule",
        choices=list(BIAS_RULES),
        help="Rule of the expert bias: SMEBU (Large), centred sign (Nano, Mini), linear (SMEBU "
        "without tanh), or none.  Its rate is --moe-router-bias-update-rate.",
    )
    group.add_argument(
        "--moe-router-bias-momentum",
        type=float,
        help="Beta, the momentum of the bias update; default 0.5 for smebu, 0 for the others.",
    )
    group.add_argument(
        "--muon-momentum-dtype",
        choices=sorted(MOMENTUM_DTYPES),
        default="fp32",
        help="What Muon keeps its momentum in.",
    )
    group.add_argument(
        "--moe-router-bias-clamp-scale",
        type=float,
        default=2.0,
        help="Kappa, the scale of SMEBU inside the tanh.",
    )
    group.add_argument(
        "--moe-router-bias-warmup-steps",
        type=int,
        default=0,
        help="Steps over which the rate of the bias update rises from zero.",
    )
    group.add_argument(
        "--moe-router-bias-freeze-step",
        type=int,
        help="Last step that moves the expert bias; default: it moves to the end.",
    )


# A flag -> the argument of the preset that gives way to it.
_INSTEAD = {"step_batch_size_schedule": "global_batch_size", "train_samples": "train_iters"}


# What names training and validation data in another way than ``--data``, whose tokenizer stays.
_OTHER_DATA = ("data_path", "data_args_path", "per_split_data_args_path")


def _first_parser() -> argparse.ArgumentParser:
    """Of the flags that decide on defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="tiny")
    for name in ("data", "out", "optimizer", "yaml_cfg", *_INSTEAD, *_OTHER_DATA):
        parser.add_argument(flag_of(name))
    parser.add_argument("--enable-msc", action="store_true")
    parser.add_argument(
        "--use-checkpoint-opt_param-scheduler",
        "--use-checkpoint-opt-param-scheduler",
        action="store_true",
        dest="use_checkpoint_opt_param_scheduler",
    )
    return parser


def default_arguments(preset: Preset, data: str | None, out: str | None) -> dict[str, Any]:
    """Defaults (by ``dest``) of a run; every one can be overridden by its Megatron flag."""
    values = {ARGUMENT_DEST.get(name, name): value for name, value in preset.model.items()}
    for name, value in TRINITY_ARCHITECTURE.items():
        if name not in ("gated_linear_unit", "activation_func"):  # --swiglu says both
            values[ARGUMENT_DEST.get(name, name)] = value
    values.update(
        swiglu=True,
        group_query_attention=True,
        position_embedding_type="rope",
        untie_embeddings_and_output_weights=True,
        spec=["trinity_megatron.layer_specs", "get_trinity_layer_spec"],
        optimizer="muon",
        lr_warmup_init=0.0,
        lr_wsd_decay_fraction=0.1,
        eval_interval=100,
        eval_iters=8,
        log_interval=10,
        logging_level=logging.WARNING,  # progress is printed; INFO lists every parameter
        # Mean over the tokens of the global batch, however they lie on ranks and micro-batches.
        calculate_per_token_loss=True,
        # A resume with another --train-iters takes the schedule of the command line.
        override_opt_param_scheduler=True,
        ckpt_format="torch_dist",
        # Megatron's own needs no further package.
        async_strategy="nvrx" if _has_resiliency_package() else "mcore",
        # The state of a distributed optimizer loads under every layout.
        dist_ckpt_optim_fully_reshardable=True,
        create_attention_mask_in_dataloader=False,
        **_UNPUBLISHED,
    )
    values.update(preset.training)
    values.pop("vocab_size", None)  # the tokenizer says it
    values.update(_host_arguments())
    if data:
        values.update(
            train_data_path=[os.path.join(data, "train")],
            valid_data_path=[os.path.join(data, "validation")],
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=os.path.join(data, "tokenizer"),
        )
    if out:
        values.update(
            save=os.path.join(out, "checkpoints"),
            load=os.path.join(out, "checkpoints"),
            save_interval=200,
            # SIGTERM saves.  Ranks ask each other in every step, for which a GPU would be waited.
            exit_signal_handler=is_cpu_host(),
            data_cache_path=os.path.join(out, "data_cache"),
            tensorboard_dir=os.path.join(out, "tensorboard"),
            tensorboard_log_interval=values.get("tensorboard_log_interval", 1),
            log_timers_to_tensorboard=True,
            wandb_project=os.environ.get("WANDB_PROJECT", "trinity-megatron"),
            wandb_exp_name=os.environ.get("WANDB_NAME", os.path.basename(os.path.normpath(out))),
            wandb_save_dir=os.environ.get("WANDB_DIR", out),
        )
    return values


# Not published for any of the models: common values stand in.
_UNPUBLISHED = {
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "clip_grad": 1.0,
    **MUON_ARGUMENT_DEFAULTS,
}


def _host_arguments() -> dict[str, Any]:
    """What a host without a GPU (or without NVIDIA's extensions) has to do without."""
    values: dict[str, Any] = {
        "transformer_impl": "local",
        # Both are extensions of apex, which is optional.
        "gradient_accumulation_fusion": _has_fused_gradients(),
        "no_persist_layer_norm": True,
        "apply_rope_fusion": _has_fused_rope(),
    }
    if is_cpu_host():
        values.update(
            distributed_backend="gloo",
            masked_softmax_fusion=False,
            # Worker processes would take the two cores from the training.
            num_workers=0,
        )
    else:
        # No recipe asked for: the best that this GPU runs (Megatron's own default is "delayed").
        values.update(bf16=True, moe_grouped_gemm=True, fp8_recipe=None)
    return values


def _has_fused_gradients() -> bool:
    """Whether weight gradients can be added to the fp32 buffer by the product that makes them."""
    extension = "fused_weight_gradient_mlp_cuda"  # of apex; Megatron's LM head asks for it
    return not is_cpu_host() and importlib.util.find_spec(extension) is not None


def _has_fused_rope() -> bool:
    """Whether Megatron has a kernel for RoPE: Transformer Engine's, which is optional."""
    kernels = (rope_utils.fused_apply_rotary_pos_emb, rope_utils.fused_apply_rotary_pos_emb_thd)
    return not is_cpu_host() and None not in kernels


def check_args(args: argparse.Namespace, manifest: DataManifest | None) -> None:
    """Check what Megatron would notice late, with an assertion, or not at all.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    named = (args.data_path, args.train_data_path)
    listed = (args.data_args_path, args.per_split_data_args_path)
    if not any((args.data, args.mock_data, *named, *listed)):
        raise UserError(
            "--data is missing. Remedy: trinity-megatron prepare-data --out DIR, then --data DIR "
            "(or Megatron's own --data-path and --tokenizer-type)."
        )
    refuse_host(args)
    _finish_async_save(args)
    check_values(args)
    check_keep_last(args)
    _check_positive(args)
    _check_parallel_sizes(args)
    fit_schedule(args, resumed_samples(args))
    if not is_cpu_host():
        _finish_fp8(args)
    if args.use_torch_fsdp2 or args.use_megatron_fsdp:
        args.gradient_accumulation_fusion = False  # on where apex is there; needs Megatron's DDP
    if args.optimizer == "muon":
        validate_muon_arguments(args)
    if args.rank == 0:  # the others get it with the datasets
        args.data_identity = read_identity(args)
    check_start(args, manifest)
    if manifest is not None and 0 < (args.padded_vocab_size or 0) < manifest.vocab_size:
        raise UserError(
            f"--padded-vocab-size {args.padded_vocab_size} is below the {manifest.vocab_size} "
            f"tokens of --data. Remedy: at least {manifest.vocab_size}."
        )
    if args.preset not in PRESETS and args.padded_vocab_size is None:
        args.padded_vocab_size = _vocabulary_of_checkpoint(args, manifest)
    # Megatron's own readers of the arguments (FLOPs, memory) want the pattern too.
    args.moe_layer_freq = [int(layer >= args.num_dense_layers) for layer in range(args.num_layers)]


def _finish_async_save(args: argparse.Namespace) -> None:
    """Give ``--async-save`` the worker without which Megatron 0.19 would switch it off.

    Raises:
        UserError: The strategy needs a package that is not installed.
    """
    if not args.async_save:
        return
    if args.async_strategy == "nvrx" and not _has_resiliency_package():
        raise UserError(
            "--async-strategy nvrx needs the package nvidia-resiliency-ext, which is not "
            "installed. Remedy: drop the flag, or pip install nvidia-resiliency-ext."
        )
    args.use_persistent_ckpt_worker = True


def _has_resiliency_package() -> bool:
    return importlib.util.find_spec("nvidia_resiliency_ext") is not None


def _vocabulary_of_checkpoint(args: argparse.Namespace, manifest: DataManifest | None) -> int:
    """Rows of the embedding of the checkpoint that ``--preset`` names, even over the ranks."""
    vocab_size = get_preset(args.preset).model["vocab_size"]
    if manifest is not None and manifest.vocab_size > vocab_size:
        raise UserError(
            f"--data {args.data} has a vocabulary of {manifest.vocab_size} tokens, --preset "
            f"{args.preset} one of {vocab_size}. Remedy: trinity-megatron prepare-data --tokenizer "
            "with the tokenizer of the checkpoint."
        )
    tp = args.tensor_model_parallel_size
    padded = -(-vocab_size // tp) * tp
    if padded != vocab_size:
        print_rank_0(
            f"> vocabulary padded from {vocab_size} to {padded} rows for "
            f"--tensor-model-parallel-size {tp}; the rows that are added take part in the softmax"
        )
    return padded


def _finish_fp8(args: argparse.Namespace) -> None:
    """Give FP8 Trinity's defaults on this GPU, and refuse what it cannot run."""
    capability = torch.cuda.get_device_capability()
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    cuda = (int(major), int(minor))
    line = fp8_defaults(args, capability, cuda=cuda)
    check_fp8(args, capability, cuda=cuda)
    if line:
        print_rank_0(f"> {line}")


# At least 1 each; what may be left out is None.
_POSITIVE = (
    "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
    "expert_model_parallel_size expert_tensor_parallel_size micro_batch_size global_batch_size "
    "seq_length num_layers hidden_size num_attention_heads num_query_groups kv_channels "
    "ffn_hidden_size moe_ffn_hidden_size train_iters train_samples log_interval eval_interval "
    "save_interval"
).split()


def _check_positive(args: argparse.Namespace) -> None:
    for name in _POSITIVE:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{flag_of(name)} {value} is below 1. Remedy: give at least 1.")


def _check_parallel_sizes(args: argparse.Namespace) -> None:
    tp, heads = args.tensor_model_parallel_size, args.num_attention_heads
    if heads % tp:
        raise UserError(
            f"--tensor-model-parallel-size {tp} does not divide --num-attention-heads {heads}. "
            f"Remedy: choose a divisor of {heads}."
        )
    if args.num_experts and args.num_experts % args.expert_model_parallel_size:
        raise UserError(
            f"--num-experts {args.num_experts} is not divisible by --expert-model-parallel-size "
            f"{args.expert_model_parallel_size}. Remedy: choose a divisor of {args.num_experts}."
        )
    if args.num_experts and not 1 <= args.moe_router_topk <= args.num_experts:
        raise UserError(
            f"--moe-router-topk {args.moe_router_topk} is not within 1..--num-experts "
            f"{args.num_experts}. Remedy: choose --moe-router-topk among these."
        )
    if tp > 1 and not args.sequence_parallel:
        raise UserError(
            f"--tensor-model-parallel-size {tp} without --sequence-parallel: Megatron's MoE layer "
            "refuses to train so. Remedy: add --sequence-parallel."
        )
    if args.context_parallel_size > 1 and args.dataloader_inter_document_masking:
        raise UserError(
            f"--context-parallel-size {args.context_parallel_size} with "
            "--dataloader-inter-document-masking is not supported by the Trinity layers yet. "
            "Remedy: drop one of the two."
        )
    if (
        tp > 1
        and args.micro_batch_size > 1
        and args.dataloader_inter_document_masking
        and "seq_aux_loss" in args.moe_router_load_balancing_type
    ):
        # Megatron packs the sequences of a micro-batch into one row and cuts that over the ranks.
        raise UserError(
            f"--micro-batch-size {args.micro_batch_size} with --dataloader-inter-document-masking, "
            f"--tensor-model-parallel-size {tp} and the sequence-wise balance loss: the loss would "
            "mix sequences. Remedy: --micro-batch-size 1."
        )
    size = tp * args.pipeline_model_parallel_size * args.context_parallel_size
    if args.world_size % size:
        raise UserError(
            f"{args.world_size} ranks cannot be divided into --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size} x "
            f"--context-parallel-size {args.context_parallel_size} = {size}. Remedy: start a "
            f"multiple of {size} ranks (trinity-megatron train --nproc {size})."
        )
    expert_tp = args.expert_tensor_parallel_size or tp
    pp, ep = args.pipeline_model_parallel_size, args.expert_model_parallel_size
    if args.world_size % (expert_tp * pp * ep):
        raise UserError(
            f"{args.world_size} ranks cannot be divided into --expert-model-parallel-size {ep} x "
            f"--pipeline-model-parallel-size {pp} x expert tensor parallelism {expert_tp} = "
            f"{expert_tp * pp * ep}. Remedy: start a multiple of {expert_tp * pp * ep} ranks."
        )
    dense = args.num_dense_layers
    if not 0 <= dense <= args.num_layers:
        raise UserError(
            f"--num-dense-layers {dense} is not within 0..--num-layers {args.num_layers}. "
            "Remedy: set both."
        )


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
