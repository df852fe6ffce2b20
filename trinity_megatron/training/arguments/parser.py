"""Arguments of a run: Megatron's own parser with ours, and a preset's values as defaults."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

from megatron.core.package_info import __version__ as megatron_version
from megatron.training import global_vars
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_args, validate_args

from trinity_megatron.data.manifest import DataManifest, load_manifest
from trinity_megatron.data.mixture.corpora import MixtureOutline
from trinity_megatron.data.mixture.open_corpora import open_mixture, read_outline
from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import flag_of
from trinity_megatron.model.config import FLAG_FIELDS, TrinityConfig
from trinity_megatron.model.presets import get_preset
from trinity_megatron.optimizer.register import finish_muon_arguments
from trinity_megatron.process.screen import tell
from trinity_megatron.training.arguments.checks import check_args
from trinity_megatron.training.arguments.defaults import default_arguments
from trinity_megatron.training.arguments.fsdp_checks import passing_as_adam
from trinity_megatron.training.arguments.parser_errors import (
    friendly_parser_errors,
    megatron_refusals,
)
from trinity_megatron.training.arguments.run_config import RunConfig
from trinity_megatron.training.arguments.unsupported import refuse_flags
from trinity_megatron.training.arguments.vocabulary import set_vocab_size
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


type _Hook = Callable[[argparse.Namespace], object]
type _DataHook = Callable[[MixtureOutline | None], object]


def parse_trinity_args(
    on_parsed: _Hook | None = None, on_checked: _Hook | None = None, *, is_dry: bool = False
) -> tuple[argparse.Namespace, MixtureOutline | None]:
    """Parse ``sys.argv`` with Megatron's parser and ours, check, and set Megatron's globals.

    The first rank reads the corpora of a mixture, once; the others read its file.

    Args:
        on_parsed: Called before the checks, which read the checkpoint of a resume and may name
            another one as the latest.
        on_checked: Called with the arguments when they are right and nothing is written yet.
        is_dry: Leave Megatron's list of the arguments out: nothing is written then.

    Returns:
        The arguments, and the mixture that ``--data`` names: with its corpora on the first rank.

    Raises:
        UserError: An argument is wrong; names field, value and remedy.
        FileNotFoundError: The data folder is missing.
    """
    check_megatron_version()
    parsers: list[argparse.ArgumentParser] = []
    mixtures: list[MixtureOutline | None] = []

    def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parsers.append(parser)
        return add_trinity_args(parser, mixtures.append)

    args = parse_args(extra_args_provider=add_args)
    (mixture,) = mixtures
    refuse_flags(args, parsers[0], mixture)
    manifest = _read_manifest(args.data, mixture)
    args.is_dry = is_dry
    if on_parsed:
        on_parsed(args)
    if mixture is not None and args.rank == 0:
        mixture = open_mixture(mixture.mixture)
    check_args(args, manifest, mixture)
    del args.is_dry  # no argument of the run
    if on_checked:
        on_checked(args)
    listing = contextlib.redirect_stdout(io.StringIO()) if is_dry else _argument_dump(args)
    with listing, megatron_refusals(), passing_as_adam(args):
        validate_args(args, {"tokenizer_type": "HuggingFaceTokenizer"})
    finish_muon_arguments(args)
    rows = args.padded_vocab_size
    with opened_later():
        global_vars.set_global_variables(args)
    set_vocab_size(args, manifest, rows)
    return args, mixture


def _read_manifest(data: str | None, mixture: MixtureOutline | None) -> DataManifest | None:
    """The manifest of ``--data``: of the folder, or of a prepared folder of the mixture."""
    if mixture is not None:
        return mixture.manifest
    return load_manifest(Path(data)) if data else None


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
        tell(f"> {path} is not written: {error.strerror}")


def add_trinity_args(
    parser: argparse.ArgumentParser, on_mixture: _DataHook | None = None
) -> argparse.ArgumentParser:
    """Add our flags; let ``--preset``, ``--data``, ``--out`` and the host set the defaults.

    Args:
        parser: Megatron's; changed.
        on_mixture: Called with the outline of the mixture that ``--data`` names, or None.
    """
    friendly_parser_errors(parser)
    _add_own_flags(parser)
    given, _ = _early_parser().parse_known_args()
    # What Megatron's parse_args() acts on by itself.
    early = argparse.Namespace(yaml_cfg=given.yaml_cfg, enable_msc=given.enable_msc)
    refuse_flags(early, parser)
    mixture = read_outline(given.data)
    if on_mixture:
        on_mixture(mixture)
    defaults = default_arguments(get_preset(given.preset), given.data, mixture, given.out)
    if given.optimizer not in (None, "muon"):  # one optimizer, one rate: that of AdamW
        for name in ("lr", "min_lr"):
            defaults[name] = defaults.pop(f"decoupled_{name}")
    if any(getattr(given, name) is not None for name in _OTHER_DATA):
        defaults.pop("train_data_path", None)
        defaults.pop("valid_data_path", None)
    # Megatron accepts only one flag of each pair, and counts a default as given.
    defaults["override_opt_param_scheduler"] = not given.use_checkpoint_opt_param_scheduler
    for name, other in OVERRIDDEN_BY.items():
        if getattr(given, name) is not None:
            defaults.pop(other, None)
    parser.set_defaults(**defaults)
    return parser


# Flag -> the argument of the preset that it overrides.
OVERRIDDEN_BY = {"step_batch_size_schedule": "global_batch_size", "train_samples": "train_iters"}


# Arguments that name training and validation data instead of ``--data``, whose tokenizer stays.
_OTHER_DATA = ("data_path", "data_args_path", "per_split_data_args_path")


def _add_own_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags made from the fields of ``RunConfig`` and ``TrinityConfig``."""
    run = ArgumentGroupFactory(RunConfig).build_group(parser, title="trinity run")
    run.description = "Folders and rules of a run."
    others = [field.name for field in fields(TrinityConfig) if field.name not in FLAG_FIELDS]
    factory = ArgumentGroupFactory(TrinityConfig, exclude=others)
    model = factory.build_group(parser, title="trinity model")
    model.description = "Fields of TrinityConfig for which Megatron has no flag."


def _early_parser() -> argparse.ArgumentParser:
    """Parser of the flags that set defaults of other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="tiny")
    for name in ("data", "out", "optimizer", "yaml_cfg", *OVERRIDDEN_BY, *_OTHER_DATA):
        parser.add_argument(flag_of(name))
    parser.add_argument("--enable-msc", action="store_true")
    parser.add_argument(
        "--use-checkpoint-opt_param-scheduler",
        "--use-checkpoint-opt-param-scheduler",
        action="store_true",
        dest="use_checkpoint_opt_param_scheduler",
    )
    return parser
