"""``trinity-megatron convert``: Hugging Face safetensors <-> Megatron ``torch_dist``, streamed.

Memory holds a few tensors at a time.  Nothing is computed: there and back are the same bytes.
"""

import argparse
import json
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from trinity_megatron import __version__
from trinity_megatron.checkpoint.hf_assets import (
    ASSETS_NAME,
    Assets,
    check_tokenizer,
    find_assets,
    find_tokenizer,
    save_assets,
    write_generation_config,
    write_tokenizer,
)
from trinity_megatron.checkpoint.hf_weights import (
    INDEX_NAME,
    SINGLE_NAME,
    HFWeights,
    HFWriter,
    build_header,
    build_index,
    parse_header,
    split_into_files,
)
from trinity_megatron.checkpoint.integrity.checked_reader import Checks
from trinity_megatron.checkpoint.param_mapping import (
    Entry,
    resolve,
    resolve_extra_state,
    resolve_momentum,
)
from trinity_megatron.checkpoint.staging import Staging, fingerprint_folder
from trinity_megatron.checkpoint.torch_dist import (
    RELEASE,
    TRACKER_NAME,
    Part,
    TorchDistReader,
    TorchDistWriter,
)
from trinity_megatron.checkpoint.transforms import Block, Shape, cut
from trinity_megatron.data.tokenizer import read_vocab_size
from trinity_megatron.errors import UserError
from trinity_megatron.model.config import (
    ARGUMENT_DEST,
    MODEL_FIELDS,
    TRINITY_ARCHITECTURE,
    TrinityConfig,
    count_dense_layers,
)
from trinity_megatron.model.hf_config import (
    CONFIG_NAME,
    compare_models,
    hf_config_from_trinity,
    read_hf_config,
    trinity_config_from_hf,
)

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = "5GB"
# What one thread holds in memory at a time, and what is redone after an interruption.
_SHARD_BYTES = 8 * 2**20
_PART_BYTES = 512 * 2**20

Tensors = dict[str, tuple[torch.dtype, Shape]]


class MegatronSource(Protocol):
    """Where Megatron's tensors come from: a checkpoint on disk or a model in memory."""

    def model_tensors(self) -> Tensors:
        """Dtype and whole shape of every tensor."""

    def parts(self, key: str) -> list[list[Part]]:
        """What there is of a tensor; columns of the same rows in one list."""

    def read(self, parts: Sequence[Part]) -> torch.Tensor:
        """Columns of the same rows, side by side."""


def hf_to_megatron(hf: Path, megatron: Path) -> None:
    """Write a ``torch_dist`` checkpoint of a Hugging Face one.

    ``--load`` and ``--pretrained-checkpoint`` take it under any parallel layout.

    Args:
        hf: Folder with ``config.json`` and safetensors files.
        megatron: Folder to make.

    Raises:
        UserError: The model is not supported, or the checkpoint is not complete or damaged.
        OSError: The target cannot be written.
    """
    begin = time.monotonic()
    config = trinity_config_from_hf(read_hf_config(hf))
    weights = HFWeights(hf)
    entries = resolve(config, stacked_experts=weights.has_stacked_experts)
    check_hf_tensors(weights, entries)
    tensors = {entry.megatron: (_dtype(entry, weights), entry.shape) for entry in entries}
    momentum = resolve_momentum(config)
    for entry in momentum:
        tensors[entry.megatron] = (torch.float32, entry.shape)
    by_key = {entry.megatron: entry for entry in (*entries, *momentum)}
    parts = [
        Part(key, start, shape)
        for key, entry in by_key.items()
        for start, shape in cut(entry.shape, _SHARD_BYTES // tensors[key][0].itemsize)
    ]

    def num_bytes(part: Part) -> int:
        return prod(part.shape) * tensors[part.key][0].itemsize

    files = _group(parts, num_bytes)
    sizes = [sum(map(num_bytes, file)) for file in files]
    source = ["hf", __version__, fingerprint_folder(hf), sizes]
    with Staging(megatron, source, num_bytes=sum(sizes)) as staging, _without_checksums():
        _say_resumed(staging)
        folder = staging.folder / RELEASE
        folder.mkdir(exist_ok=True)
        writer = TorchDistWriter(
            folder,
            tensors,
            files,
            common=_common_state(config),
            extra_state=resolve_extra_state(config),
        )

        def write(index: int, advance: Callable[[int], None]) -> Any:
            reader = weights.reader()
            buffers: dict[int, torch.Tensor] = {}

            def read(part: Part) -> torch.Tensor:
                # Written at once, so that the next part can have the same memory: touching fresh
                # memory takes as long as writing it to the disk.
                size = num_bytes(part)
                if size not in buffers:
                    buffers[size] = torch.empty(size, dtype=torch.uint8)
                values = buffers[size].view(tensors[part.key][0]).view(part.shape)
                blocks = by_key[part.key].clip(part.start, part.shape)
                if not blocks:  # the momentum
                    values.zero_()
                for block in blocks:
                    block.megatron_view(values, part.start).copy_(reader.read(block))
                check_finite(values, blocks, part.start, str(hf))
                advance(size)
                return values

            return writer.write(index, read)

        writer.finish(staging.run(write, sizes, description="to Megatron"))
        save_assets(hf, staging.folder / ASSETS_NAME, weights.headers)
        (staging.folder / TRACKER_NAME).write_text(RELEASE)
    _say_done(hf, megatron, sum(sizes), time.monotonic() - begin)
    logger.info(
        "The momentum of the expert bias (SMEBU) has no name on the Hugging Face side: it starts "
        "at zero.\nTo train on: trinity-megatron train --preset %s --pretrained-checkpoint %s ...",
        megatron,
        megatron,
    )


def megatron_to_hf(
    megatron: Path,
    hf: Path,
    *,
    tokenizer: Path | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    verify_checksums: bool = True,
) -> None:
    """Write the model of a ``torch_dist`` checkpoint as Hugging Face's safetensors.

    Args:
        megatron: What ``--save`` was, or the folder of one iteration; saved under any layout.
        hf: Folder to make.
        tokenizer: Folder of the tokenizer.  If None, the one that came with the Hugging Face
            checkpoint the training began with, else the one that the run was trained with.
        max_shard_size: Size of a weight file, e.g. ``5GB``, unless the files are known from the
            Hugging Face checkpoint the training began with.
        verify_checksums: Compare the checksums of what is read.

    Raises:
        UserError: The checkpoint is not complete or damaged, or no Trinity model.
        OSError: The target cannot be written.
    """
    begin = time.monotonic()
    source = TorchDistReader(megatron, Checks(verify_checksums))
    config = config_from_args(source.args)
    assets = find_assets(megatron)
    if tokenizer is None and assets is None:
        tokenizer = find_tokenizer(source.folder, source.args)
    if tokenizer is not None:
        check_tokenizer(megatron, tokenizer)
    config.tokenizer_vocab_size = find_vocab_size(source.args, tokenizer)
    fingerprint = ["megatron", __version__, fingerprint_folder(source.folder), max_shard_size]
    num_bytes = write_hf(
        source,
        config,
        hf,
        name=str(source.folder),
        assets=assets,
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
        fingerprint=fingerprint,
    )
    _say_done(megatron, hf, num_bytes, time.monotonic() - begin)


def write_hf(
    source: MegatronSource,
    config: TrinityConfig,
    hf: Path,
    *,
    name: str,
    assets: Assets | None = None,
    tokenizer: Path | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    fingerprint: Any = None,
) -> int:
    """Write Megatron's tensors as a Hugging Face checkpoint.

    Args:
        source: Where they come from.
        config: The model.
        hf: Folder to make.
        name: Of the source, in messages.
        assets: Files of the Hugging Face checkpoint that it all began with.
        tokenizer: Folder of the tokenizer; takes precedence.
        max_shard_size: See :func:`megatron_to_hf`.
        fingerprint: State of the source; without it an interrupted conversion begins anew.

    Returns:
        Bytes of weights written.
    """
    found = source.model_tensors()
    entries = match_tensors(found, config, assets=assets, name=name)
    if tokenizer is not None:
        _check_all_tokens_have_rows(tokenizer, config.vocab_size, name)
    tensors: Tensors = {
        hf_name: (torch.float32 if entry.keep_fp32 else found[entry.megatron][0], shape)
        for entry in entries
        for hf_name, shape in entry.hf.items()
    }
    headers = _headers(tensors, assets, max_shard_size)
    by_key = {entry.megatron: entry for entry in entries}
    units = [parts for entry in entries for parts in source.parts(entry.megatron)]

    def num_bytes(parts: Sequence[Part]) -> int:
        return sum(prod(part.shape) for part in parts) * found[parts[0].key][0].itemsize

    batches = _group(units, num_bytes)
    sizes = [sum(map(num_bytes, batch)) for batch in batches]
    # A model in memory may have changed since: nothing of an earlier attempt is taken up.
    state = [fingerprint or uuid.uuid4().hex, headers, sizes]
    with Staging(hf, state, num_bytes=sum(sizes)) as staging:
        _say_resumed(staging)
        # Before the weights: what is wrong with them shows at once.
        _write_side_files(staging.folder, config, tensors, headers, assets, tokenizer)
        writer = HFWriter(staging.folder, headers)

        def write(index: int, advance: Callable[[int], None]) -> None:
            touched = set()
            for parts in batches[index]:
                whole, start = source.read(parts), parts[0].start
                blocks = by_key[parts[0].key].clip(start, tuple(whole.shape))
                check_finite(whole, blocks, start, f"{name}: {parts[0].key}, to be")
                for block in blocks:
                    writer.write(block, block.megatron_view(whole, start))
                    touched.add(block.hf_name)
                advance(num_bytes(parts))
            writer.sync(touched)

        try:
            staging.run(write, sizes, description="to Hugging Face")
        finally:
            writer.close()
    return sum(sizes)


def config_from_args(args: argparse.Namespace, **overrides: Any) -> TrinityConfig:
    """The model that a run's arguments describe.

    Args:
        args: Arguments in a checkpoint.
        **overrides: Any field of :class:`TrinityConfig`.

    Raises:
        UserError: They are of another architecture.
    """
    values = dict(TRINITY_ARCHITECTURE)
    for name in _SAVED_FIELDS:
        value = getattr(args, ARGUMENT_DEST.get(name, name), None)
        if value is not None:
            values[name] = value
    score, experts = (getattr(args, n, None) for n in ("moe_router_score_function", "num_experts"))
    if score != "sigmoid" or not experts:
        raise UserError(
            f"The checkpoint was saved with num_experts={experts!r} and moe_router_score_function="
            f"{score!r}: it is no Trinity model."
        )
    if "num_dense_layers" not in values:  # saved by a script without our arguments
        values["num_dense_layers"] = count_dense_layers(
            args.moe_layer_freq, num_layers=args.num_layers
        )
    return TrinityConfig(**{**values, **overrides})


_SAVED_FIELDS = (
    *MODEL_FIELDS,
    *"max_position_embeddings moe_router_bias_update_rule moe_router_bias_update_rate".split(),
    "tokenizer_vocab_size",
)


def _common_state(config: TrinityConfig) -> dict[str, Any]:
    """What Megatron wants to know of a checkpoint that no run has saved."""
    args = {ARGUMENT_DEST.get(name, name): getattr(config, name) for name in _SAVED_FIELDS}
    args.update(
        padded_vocab_size=config.vocab_size,
        moe_layer_freq=config.moe_layer_freq,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        add_position_embedding=True,
        position_embedding_type="rope",
        group_query_attention=True,
        swiglu=True,
        normalization="RMSNorm",
        untie_embeddings_and_output_weights=True,
        add_bias_linear=False,
        spec=["trinity_megatron.layer_specs", "get_trinity_layer_spec"],
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        world_size=1,
        data_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
    )
    return {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
        },
    }


def check_hf_tensors(weights: HFWeights, entries: Sequence[Entry]) -> None:
    """Check that the files hold exactly the tensors of the model.

    Raises:
        UserError: Lists what is missing, too much or of another shape.
    """
    expected = {name: shape for entry in entries for name, shape in entry.hf.items()}
    found = {name: info.shape for name, info in weights.tensors.items()}
    _compare_tensors(expected, found, f"{weights.folder} does not fit its {CONFIG_NAME}")


def check_megatron_tensors(
    found: Tensors, entries: Sequence[Entry], momentum: Sequence[Entry], name: str
) -> None:
    """Check that a Megatron checkpoint holds exactly the tensors of the model.

    Raises:
        UserError: Lists what is missing, too much or of another shape.
    """
    left_out = {entry.megatron for entry in momentum}
    shapes = {key: shape for key, (_, shape) in found.items() if key not in left_out}
    expected = {}
    for entry in entries:
        expected[entry.megatron] = entry.shape
        rows = shapes.get(entry.megatron, entry.shape)
        if _is_padded(entry) and rows[0] >= entry.shape[0]:
            shapes[entry.megatron] = (entry.shape[0], *rows[1:])
    _compare_tensors(expected, shapes, f"{name} does not fit its arguments")


def _compare_tensors(expected: Mapping[str, Shape], found: Mapping[str, Shape], what: str) -> None:
    problems = [
        *(f"missing: {name}" for name in expected if name not in found),
        *(f"not of this model: {name}" for name in found if name not in expected),
        *(
            f"{name} has shape {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ),
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"{what}:\n  {shown}{more}\nNothing was converted.")


def check_finite(values: torch.Tensor, blocks: Sequence[Block], start: Shape, name: str) -> None:
    """Refuse NaN and infinity.

    Args:
        values: A part of a Megatron tensor.
        blocks: What it is made of.
        start: Where it begins in the whole.
        name: Of the checkpoint, for the message.

    Raises:
        UserError: Names the Hugging Face tensors.
    """
    if _is_finite(values):
        return
    parts = ((block, block.megatron_view(values, start)) for block in blocks)
    bad = sorted({block.hf_name for block, part in parts if not _is_finite(part)})
    if bad:  # otherwise it is in rows that are left out
        raise UserError(
            f"{name} {', '.join(bad)} holds NaN or infinite numbers. Nothing was converted."
        )


def _is_finite(values: torch.Tensor) -> bool:
    # Both ends are finite only if all is: NaN propagates.  No copy, unlike isfinite().
    return all(math.isfinite(end) for end in torch.aminmax(values))


def _is_padded(entry: Entry) -> bool:
    return "word_embeddings" in entry.megatron or "output_layer" in entry.megatron


def _dtype(entry: Entry, weights: HFWeights) -> torch.dtype:
    found = {weights.tensors[name].dtype for name in entry.hf}
    if len(found) > 1:
        raise UserError(
            f"{weights.folder}: {', '.join(entry.hf)} are of several dtypes ("
            f"{', '.join(sorted(map(str, found)))}) but one tensor in Megatron. Remedy: store them "
            "in one."
        )
    (dtype,) = found
    if entry.keep_fp32 and dtype != torch.float32:
        logger.warning("%s is %s; widened to float32", ", ".join(entry.hf), dtype)
        return torch.float32
    return dtype


def match_tensors(
    found: Tensors,
    config: TrinityConfig,
    *,
    assets: Assets | None,
    name: str,
    stacked_experts: bool = False,
) -> list[Entry]:
    """The table for Megatron's tensors, after a check that they are exactly those of the model.

    Args:
        found: Dtype and whole shape of every tensor.
        config: The model; gets the vocabulary of the Hugging Face side.
        assets: Files of the Hugging Face checkpoint that it all began with.
        name: Of the source, in messages.
        stacked_experts: See :func:`resolve`.

    Raises:
        UserError: The model is another one than that of the assets, or tensors are missing, too
            many or of another shape.
    """
    _set_vocabulary(config, found, assets, name)
    entries = resolve(config, stacked_experts=stacked_experts)
    check_megatron_tensors(found, entries, resolve_momentum(config), name)
    return entries


def get_vocabulary_rows(found: Tensors) -> int:
    """Rows of the embedding, padding included; 0 if there is none."""
    return next((shape[0] for key, (_, shape) in found.items() if "word_embeddings" in key), 0)


def _set_vocabulary(
    config: TrinityConfig, found: Tensors, assets: Assets | None, name: str
) -> None:
    """Give the model the vocabulary of the Hugging Face side: without Megatron's padding."""
    rows = get_vocabulary_rows(found)
    config.vocab_size = rows
    if assets is None:
        _leave_out_padding(config, rows, name)
        return
    original = trinity_config_from_hf(assets.config)
    if different := compare_models(config, original):
        fields = ", ".join(f"{field}={a!r} (there {b!r})" for field, (a, b) in different.items())
        raise UserError(
            f"{name} is another model than {assets.folder / CONFIG_NAME}: {fields}. Remedy: remove "
            f"{assets.folder} if the model was changed on purpose."
        )
    if original.vocab_size > rows:
        raise UserError(
            f"{name} has {rows} rows of embeddings, fewer than vocab_size={original.vocab_size} in "
            f"{assets.folder / CONFIG_NAME}."
        )
    config.tokenizer_vocab_size = original.vocab_size
    _leave_out_padding(config, rows, name)


def _leave_out_padding(config: TrinityConfig, rows: int, name: str) -> None:
    known = config.tokenizer_vocab_size
    if known is None:
        logger.warning(
            "%s does not say how many of its %d rows of embeddings belong to a token: all of them "
            "are kept, Megatron's padding included.",
            name,
            rows,
        )
        return
    if known > rows:
        raise UserError(
            f"{name} has {rows} rows of embeddings, fewer than the {known} tokens that it says it "
            "was trained with."
        )
    if known < rows:
        logger.info(
            "%d rows of embeddings beyond vocab_size=%d are Megatron's padding and left out.",
            rows - known,
            known,
        )
    config.vocab_size = known


def find_vocab_size(args: argparse.Namespace, tokenizer: Path | None) -> int | None:
    """How many rows of the embedding belong to a token.

    A run writes it into its checkpoints; those of other scripts and of earlier releases lack it.
    There a tokenizer says it, if Megatron's padding of its size gives the rows that there are.

    Args:
        args: Arguments in a checkpoint.
        tokenizer: Folder of the tokenizer of the run.

    Returns:
        None where it is not known.
    """
    saved = getattr(args, "tokenizer_vocab_size", None)
    if saved is not None or tokenizer is None or not (tokenizer / "tokenizer.json").is_file():
        return saved
    size = read_vocab_size(tokenizer)
    multiple = getattr(args, "make_vocab_size_divisible_by", 128)
    multiple *= getattr(args, "tensor_model_parallel_size", 1)
    padded = -(-size // multiple) * multiple
    return size if padded == getattr(args, "padded_vocab_size", None) else None


def _check_all_tokens_have_rows(tokenizer: Path, rows: int, name: str) -> None:
    size = read_vocab_size(tokenizer)
    if size > rows:
        raise UserError(
            f"{tokenizer} has {size} tokens, but {name} has {rows} rows of embeddings. Remedy: "
            "--tokenizer DIR with the tokenizer that the model was trained with."
        )


def _headers(tensors: Tensors, assets: Assets | None, max_shard_size: str) -> dict[str, str]:
    """JSON header of each file: those of the original files if the tensors are still the same."""
    if assets is not None:
        known = {
            name: (info.dtype, info.shape)
            for file, header in assets.headers.items()
            for name, info in parse_header(file, header).items()
        }
        if known == tensors:
            return assets.headers
    files = split_into_files(tensors, max_shard_size=max_shard_size)
    return {
        file: build_header({name: tensors[name] for name in names}) for file, names in files.items()
    }


def _write_side_files(
    folder: Path,
    config: TrinityConfig,
    tensors: Tensors,
    headers: dict[str, str],
    assets: Assets | None,
    tokenizer: Path | None,
) -> None:
    """Everything but the weights."""
    dtype = tensors["lm_head.weight"][0]
    ids: dict[str, int] = {}
    if assets is not None:
        assets.copy_files(folder)
    if tokenizer is not None:
        ids = write_tokenizer(tokenizer, folder)
    elif assets is None:
        write_generation_config(folder, {})
    fields = (
        dict(assets.config) if assets is not None else hf_config_from_trinity(config, dtype=dtype)
    )
    fields.update(ids)
    for stated in ("dtype", "torch_dtype"):  # the weights may have been trained in another one
        if fields.get(stated):
            fields[stated] = str(dtype).removeprefix("torch.")
    if assets is None or fields != assets.config:
        (folder / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    is_original = assets is not None and headers is assets.headers
    if not is_original:
        (folder / INDEX_NAME).unlink(missing_ok=True)
        if list(headers) != [SINGLE_NAME]:
            (folder / INDEX_NAME).write_text(build_index(headers), encoding="utf-8")


def _group[T](items: Iterable[T], num_bytes: Callable[[T], int]) -> list[list[T]]:
    """Cut a list into runs of about ``_PART_BYTES``."""
    groups: list[list[T]] = []
    size = _PART_BYTES
    for item in items:
        if size >= _PART_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += num_bytes(item)
    return groups


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Leave out torch's CRC-32 of each record: zlib's of the whole is two and a half times as fast.

    `TorchDistWriter` has that one.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _say_resumed(staging: Staging) -> None:
    if staging.resumed:
        logger.info("Going on with an interrupted conversion.")


def _say_done(source: Path, target: Path, num_bytes: int, seconds: float) -> None:
    rate = num_bytes / 1e9 / seconds
    logger.info(
        "%s -> %s: %.2f GB in %.1f s (%.2f GB/s)", source, target, num_bytes / 1e9, seconds, rate
    )
