"""What a run starts from: looked at before anything is built."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from trinity_megatron.checkpoint.hf_assets import ASSETS_NAME, check_tokenizer, read_stamp
from trinity_megatron.checkpoint.integrity.checks import Checks
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader, find_whole
from trinity_megatron.checkpoint.torch_dist.tracker import (
    RELEASE,
    TRACKER_NAME,
    iteration_name,
    read_tracker,
    write_tracker,
)
from trinity_megatron.data.corpus import hash_file
from trinity_megatron.data.manifest import DataManifest
from trinity_megatron.data.mixture.definition import is_mixture
from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import ARGUMENT_DEST, MODEL_FIELDS, SHAPE_FIELDS
from trinity_megatron.model.hf_config import plain
from trinity_megatron.process.screen import tell
from trinity_megatron.training.arguments.schedule import BatchSizes
from trinity_megatron.training.damage import find_readable_before, set_unreadable_aside
from trinity_megatron.training.datasets.data_identity import check_data
from trinity_megatron.training.lineage import check_lineage, describe_start

# Transformer Engine's variable.
_ALLOW_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def check_start(args: argparse.Namespace, manifest: DataManifest | None) -> None:
    """Refuse a start from random weights where a checkpoint was asked for, or from a damaged one.

    Rank 0 looks into the checkpoints for all ranks.

    Args:
        args: Of the run, as parsed.
        manifest: Of ``--data``.

    Raises:
        UserError: Names the flag, the checkpoint and the remedy.
    """
    is_dry = getattr(args, "is_dry", False)  # changes nothing
    own = args.save and Path(args.save).resolve()
    named = {"--load": args.load, "--pretrained-checkpoint": args.pretrained_checkpoint}
    folders = {flag: Path(name) for flag, name in named.items() if name and "://" not in name}
    if "--load" in folders and folders["--load"].resolve() == own and args.rank == 0 and not is_dry:
        mend_tracker(folders["--load"])
        if args.on_damage == "previous":
            set_unreadable_aside(folders["--load"])
    found = {flag: path for flag, path in folders.items() if (path / TRACKER_NAME).is_file()}
    if args.ckpt_step is not None and args.rank == 0 and folders:
        check_step(args.ckpt_step, next(iter((found or folders).values())))
    for flag, path in folders.items():
        # A run's own folder may be empty yet; Megatron takes --load where that holds something.
        is_needed = not args.non_persistent_ckpt_type and path.resolve() != own
        if flag == "--pretrained-checkpoint":
            is_needed = "--load" not in found
        if is_needed and flag not in found:
            raise UserError(
                f"{flag} {path} holds no checkpoint (no {TRACKER_NAME}). "
                "Remedy: name what --save was, or what trinity-megatron convert --to-megatron made."
            )
    if manifest is not None:
        for flag, path in folders.items():
            check_checkpoint_vocabulary(path, manifest, flag=flag)
    elif args.rank == 0 and (tokenizer := get_tokenizer_folder(args)):
        for path in folders.values():
            check_tokenizer(path, tokenizer, flag="--tokenizer-model")
    if args.rank == 0 and _is_torch_dist(args) and found:
        flag = "--load" if "--load" in found else "--pretrained-checkpoint"
        saved, step = read_saved_args(
            found[flag], args.ckpt_step, flag, verify_checksums=args.verify_checksums
        )
        if args.transformer_impl == "transformer_engine":
            check_delayed_scales(saved, args, flag=f"{flag} {found[flag]}")
        check_model(saved, args, flag=f"{flag} {found[flag]}")
        if flag == "--load" and not (args.finetune or args.skip_train):
            check_lineage(saved, args)
            check_batch_size(saved, step, args)
            check_data(saved, step, args)
            args.lineage = args.lineage or getattr(saved, "lineage", None)
        elif not args.skip_train:
            args.lineage = describe_start(saved, step, found[flag], args)


def check_step(step: int, folder: Path) -> None:
    """Refuse a ``--ckpt-step`` that was not saved.

    Args:
        step: The iteration.
        folder: What ``--save`` was.

    Raises:
        UserError: Names the folder, the iterations there and the remedy.
    """
    if step > 0 and (folder / iteration_name(step)).is_dir():
        return
    names = (path.name[5:] for path in folder.glob("iter_*"))
    steps = sorted(int(name) for name in names if name.isdigit())
    if not steps:
        raise UserError(
            f"--ckpt-step {step}: {folder} holds no step at all. Remedy: drop the flag, or name "
            "another folder."
        )
    more = "..., " if len(steps) > 10 else ""
    raise UserError(
        f"--ckpt-step {step} is not in {folder}, which holds the steps "
        f"{more}{', '.join(map(str, steps[-10:]))}. Remedy: --ckpt-step with one of them."
    )


def mend_tracker(folder: Path) -> None:
    """Name the newest complete checkpoint where a run that was killed could not.

    The name of the latest checkpoint is the last that is written.  Without it Megatron begins at
    random weights, and with half of it ends as if all were well.

    Args:
        folder: Of the run's checkpoints; may be empty.

    Raises:
        UserError: The tracker names nothing, and there is no complete checkpoint.
    """
    tracker, word = folder / TRACKER_NAME, read_tracker(folder)
    if word is not None and (word.isdigit() or word == RELEASE):
        return
    newest = find_newest(folder)
    if newest is not None:
        write_tracker(folder, newest)
        was = "was not there" if word is None else f"said {word!r}"
        tell(f"> {tracker} {was}; it names the newest complete checkpoint now: {newest}")
    elif word is not None:
        raise UserError(
            f"{tracker} says {word!r}, and no complete checkpoint lies beside it. Remedy: another "
            "--out (or --save), or delete that file to begin at random weights."
        )


def find_newest(folder: Path) -> int | None:
    """The newest iteration whose ``torch_dist`` checkpoint is complete.

    Args:
        folder: What ``--save`` was.
    """
    for path in sorted(folder.glob("iter_*"), reverse=True):
        if path.name[5:].isdigit():
            try:
                return int(TorchDistReader(path, Checks(quiet=True)).folder.name[5:])
            except ValueError:
                continue
    return None


def read_saved_state(
    folder: Path,
    step: int | None = None,
    flag: str = "--load",
    *,
    verify_checksums: bool = True,
) -> tuple[dict[str, Any], int | None]:
    """What a checkpoint keeps beside its tensors, all of whose files are there.

    Args:
        folder: What ``--save`` was.
        step: Iteration; None for the latest.
        flag: That named the folder.
        verify_checksums: Compare those of what is read.

    Returns:
        Megatron's common state, with ``args`` and ``opt_param_scheduler``; and the iteration, None
        for a release.

    Raises:
        UserError: The checkpoint is damaged; names the file and the remedy.
    """
    named = folder if step is None else folder / iteration_name(step)
    try:
        # What has no checksums is said when it is loaded.
        reader = TorchDistReader(named, Checks(verify_checksums, quiet=True))
        number = reader.folder.name.removeprefix("iter_")
        return reader.common, int(number) if number.isdigit() else None
    except ValueError as error:
        word = read_tracker(folder) or "" if step is None else str(step)
        damaged = folder / iteration_name(int(word)) if word.isdigit() else named
        raise UserError(f"{flag}: {error}{advise_other_step(damaged)}") from error


def read_saved_args(
    folder: Path,
    step: int | None = None,
    flag: str = "--load",
    *,
    verify_checksums: bool = True,
) -> tuple[object, int | None]:
    """The arguments of the run that saved a checkpoint, None where there are none.

    Arguments, second result and errors are those of :func:`read_saved_state`.
    """
    common, number = read_saved_state(folder, step, flag, verify_checksums=verify_checksums)
    return common.get("args"), number


def advise_other_step(folder: Path) -> str:
    """Words that name a whole checkpoint beside a damaged one; empty if there is none.

    Args:
        folder: Of the damaged iteration.
    """
    step = find_whole(folder.parent, other_than=folder)
    if step is None:
        return ""
    return f" Or go on from the complete checkpoint {step}: --ckpt-step {step}."


def check_model(saved: object, args: argparse.Namespace, *, flag: str) -> None:
    """Refuse to go on with another model, or with an optimizer that the checkpoint has no state of.

    Args:
        saved: Arguments of the run that saved the checkpoint, or of its conversion.
        args: Of the run that starts.
        flag: That names the checkpoint, with its value.

    Raises:
        UserError: Names what differs, both values and the remedy.
    """
    names = [ARGUMENT_DEST.get(name, name) for name in MODEL_FIELDS]
    pairs = {name: (getattr(saved, name, None), getattr(args, name)) for name in names}
    different = {
        name: (before, now)
        for name, (before, now) in pairs.items()
        if before is not None and plain(before) != plain(now)
    }
    starts_anew = args.finetune or not flag.startswith("--load ")
    shapes = {ARGUMENT_DEST.get(name, name) for name in SHAPE_FIELDS}
    if different and starts_anew and not shapes & set(different):
        for name, (before, now) in different.items():  # a context extension changes some
            tell(f"> {name} is {now!r}; {flag} was saved with {before!r}")
    elif different:
        what = ", ".join(f"{name} {before!r}" for name, (before, _) in different.items())
        given = ", ".join(f"{now!r}" for _, now in different.values())
        raise UserError(
            f"{flag} is another model: it was saved with {what}; this run has {given}. Remedy: the "
            "flags of that run, or another --out."
        )
    if not starts_anew:
        _check_optimizer(saved, args, flag)


def _check_optimizer(saved: object, args: argparse.Namespace, flag: str) -> None:
    """The state is of this optimizer, and in shards if this run's is."""
    if args.no_load_optim or args.skip_train or getattr(saved, "no_save_optim", False):
        return
    anew = "or --no-load-optim to begin with an empty state"
    optimizer = getattr(saved, "optimizer", args.optimizer)
    if optimizer != args.optimizer:
        raise UserError(
            f"--optimizer {args.optimizer}: {flag} holds the state of {optimizer}. Remedy: "
            f"--optimizer {optimizer}, {anew}."
        )
    now = args.use_distributed_optimizer
    before = getattr(saved, "use_distributed_optimizer", now)
    # What Megatron turns it into for other optimizers.
    before = before or getattr(saved, "use_layer_wise_distributed_optimizer", False)
    if before and not now:
        raise UserError(
            f"{flag} holds the state of the distributed optimizer, which this run does not have. "
            f"Remedy: --use-distributed-optimizer, on one rank too, {anew}."
        )
    if now and not before:
        given = "--use-megatron-fsdp" if args.use_megatron_fsdp else "--use-distributed-optimizer"
        raise UserError(
            f"{given}: {flag} holds the state of an optimizer that is not distributed. Remedy: "
            f"drop {given}, {anew}."
        )


def check_batch_size(saved: object, step: int | None, args: argparse.Namespace) -> None:
    """Refuse a resume whose batch sizes are not those that made the steps so far.

    Megatron counts consumed samples, and says by the batch sizes of today how many steps they are.

    Args:
        saved: Arguments of the run that saved the checkpoint.
        step: Its iteration.
        args: Of the run that resumes.

    Raises:
        UserError: Names both sizes and the remedy.
    """
    consumed = getattr(saved, "consumed_train_samples", 0)
    if args.decrease_batch_size_if_needed:  # the batches were smaller than they are called
        return
    if not consumed or step is None or BatchSizes.of(args).steps_of(consumed) == step:
        return
    before = getattr(saved, "step_batch_size_schedule", None)
    size = getattr(saved, "global_batch_size", None)
    was = f"--step-batch-size-schedule {before!r}" if before else f"batches of {size}"
    now, schedule = f"--global-batch-size {args.global_batch_size}", args.step_batch_size_schedule
    new = before or f"0:{size} {consumed * args.seq_length}:{args.global_batch_size or 'N'}"
    if schedule is not None:
        now = f"--step-batch-size-schedule {schedule!r}"
    raise UserError(
        f"{now}: --load {args.load} was trained with {was}, {consumed} samples in {step} steps; so "
        "the learning-rate schedule would jump. Remedy: --step-batch-size-schedule with the past "
        f"and the future, '{new}' (consumed tokens and batch sizes)."
    )


def resumed_samples(args: argparse.Namespace) -> int:
    """Samples that the run has consumed before it resumes; 0 for a new one.

    Every rank has to know, to cut its micro-batch alike; where no batch grows it does not matter.

    Raises:
        UserError: The checkpoint is damaged.
    """
    if args.step_batch_size_schedule is None or args.finetune or not args.load:
        return 0
    folder = Path(args.load)
    word = read_tracker(folder) or ""
    if word == RELEASE or not _is_torch_dist(args):
        return 0
    if args.ckpt_step is not None:
        check_step(args.ckpt_step, folder)
    # As rank 0 mends it.
    step = args.ckpt_step or (int(word) if word.isdigit() else find_newest(folder))
    if step is not None and args.ckpt_step is None and args.on_damage == "previous":
        step = find_readable_before(folder, step + 1)
    if step is None:
        return 0
    saved, _ = read_saved_args(folder, step, verify_checksums=args.verify_checksums)
    return getattr(saved, "consumed_train_samples", 0)


def _is_torch_dist(args: argparse.Namespace) -> bool:
    return args.ckpt_format == "torch_dist" and not args.auto_detect_ckpt_format


def check_delayed_scales(saved: object, args: argparse.Namespace, *, flag: str) -> None:
    """Refuse a start from a checkpoint with or without the past values of delayed scaling.

    Args:
        saved: Arguments of the run that saved it.
        args: Of the run that starts, with Transformer Engine.
        flag: That names the checkpoint, with its value.

    Raises:
        UserError: Names the checkpoint and the remedy.
    """
    had_scales = getattr(saved, "fp8", None) and getattr(saved, "fp8_recipe", None) == "delayed"
    wants_scales = args.fp8 and args.fp8_recipe == "delayed"
    if wants_scales and not had_scales:
        raise UserError(
            f"--fp8-recipe delayed cannot start from {flag}: it was not saved with that "
            "recipe and holds no past values to scale by. Remedy: --fp8-recipe tensorwise, which "
            "needs none and runs on the same GPUs."
        )
    if had_scales and not wants_scales:
        raise UserError(
            f"{flag} was saved with --fp8-recipe delayed, whose past values Transformer "
            "Engine does not load into anything else. Remedy: --fp8-format hybrid --fp8-recipe "
            "delayed, or convert the checkpoint to Hugging Face and back."
        )
    if wants_scales and os.environ.get(_ALLOW_PICKLES) != "1":
        raise UserError(
            f"{flag} holds the past values of --fp8-recipe delayed as pickles, which "
            f"Transformer Engine loads only when it is told to. Remedy: {_ALLOW_PICKLES}=1 if you "
            "trust the checkpoint."
        )
    size = getattr(saved, "expert_model_parallel_size", None)
    if wants_scales and size != args.expert_model_parallel_size:
        raise UserError(
            f"--expert-model-parallel-size {args.expert_model_parallel_size}: {flag} was "
            f"saved with {size}, and Megatron mixes up the past values of --fp8-recipe delayed "
            f"when experts move. Remedy: --expert-model-parallel-size {size}."
        )


def check_checkpoint_vocabulary(
    load: Path, manifest: DataManifest, *, flag: str = "--load"
) -> None:
    """Refuse to continue a checkpoint with data of another vocabulary.

    The fingerprint of the tokenizer lies beside the checkpoints since the run's first start; a
    converted checkpoint has the tokenizer itself.

    Raises:
        UserError: Names both vocabularies and the remedy.
    """
    known, tokenizer = read_stamp(load), load / ASSETS_NAME / "tokenizer.json"
    if known is None and tokenizer.exists():
        known = hash_file(tokenizer)
    if known is not None and known != manifest.tokenizer_fingerprint:
        raise UserError(
            f"{flag} {load}: the checkpoint was trained with the vocabulary {known[:12]}, but "
            f"--data has {manifest.tokenizer_fingerprint[:12]} ({manifest.vocab_size} tokens). "
            "Remedy: give the data folder of that run (or prepare-data --tokenizer with its "
            "tokenizer), or another --out to start anew."
        )


def get_tokenizer_folder(args: argparse.Namespace) -> Path | None:
    """The tokenizer that made the run's data; None where it is not a folder of Hugging Face's.

    Args:
        args: Of the run.
    """
    is_mixed = getattr(args, "data_mixture", None)  # raw text, too
    if getattr(args, "data", None) and not is_mixed and not is_mixture(args.data):
        return Path(args.data) / "tokenizer"
    named = getattr(args, "tokenizer_model", None)
    is_of_hf = getattr(args, "tokenizer_type", None) in (None, "HuggingFaceTokenizer")
    if not named or not is_of_hf or not (Path(named) / "tokenizer.json").is_file():
        return None
    return Path(named)
