"""The table: Megatron name <-> Hugging Face name(s) <-> transform.

``*`` in a name is the layer, and ``{e}`` the expert.  Source of Hugging Face's names: transformers
``models/afmoe`` and the released checkpoints.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Literal

from trinity_megatron.checkpoint.transforms import (
    Block,
    Shape,
    Transform,
    check_tiling,
    query_groups,
    rows,
    same,
    stack,
    stacked,
)
from trinity_megatron.model.config import TrinityConfig

Layers = Literal["all", "dense", "moe"]


@dataclass(frozen=True)
class Mapping:
    """One row of the table.

    Attributes:
        megatron: Key in a distributed checkpoint.
        hf: Names on the Hugging Face side, in the order that the transform wants.
        shapes: Their shapes, in the dimensions of :func:`get_dimensions`, e.g. ``"ffn d"``.
        transform: How they lie in the Megatron tensor.
        layers: Layers that have it, for names with ``*``.
        keep_fp32: Held in fp32 on both sides, whatever the precision of the model.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[str, ...]
    transform: Callable[..., Transform] = same
    layers: Layers = "all"
    keep_fp32: bool = False


def _row(megatron: str, hf: str, shapes: str, *options: object, **fields: object) -> Mapping:
    names = tuple(hf.split())
    each = tuple(part.strip() for part in shapes.split(","))
    return Mapping(megatron, names, each * (len(names) // len(each)), *options, **fields)  # type: ignore[arg-type]


_M, _H = "decoder.layers.*.", "model.layers.*."
_ATTENTION, _HF_ATTENTION = f"{_M}self_attention.", f"{_H}self_attn."
_SHARED, _EXPERTS = f"{_M}mlp.shared_experts.", f"{_M}mlp.experts.experts."
_HF_SHARED, _HF_EXPERT = f"{_H}mlp.shared_experts.", f"{_H}mlp.experts.{{e}}."
_QKV = "q_proj", "gate_proj", "k_proj", "v_proj"


def _names(prefix: str, parts: Sequence[str]) -> str:
    return " ".join(f"{prefix}{part}.weight" for part in parts)


_GATE_UP = ("gate_proj", "up_proj")

TABLE: tuple[Mapping, ...] = (
    _row("embedding.word_embeddings.weight", "model.embed_tokens.weight", "vocab d"),
    _row(f"{_M}input_layernorm.weight", f"{_H}input_layernorm.weight", "d"),
    _row(
        f"{_ATTENTION}linear_qkv.weight",
        _names(_HF_ATTENTION, _QKV),
        "q d, q d, kv d, kv d",
        query_groups,
    ),
    _row(f"{_ATTENTION}q_layernorm.weight", f"{_HF_ATTENTION}q_norm.weight", "head"),
    _row(f"{_ATTENTION}k_layernorm.weight", f"{_HF_ATTENTION}k_norm.weight", "head"),
    _row(f"{_ATTENTION}linear_proj.weight", f"{_HF_ATTENTION}o_proj.weight", "d q"),
    _row(f"{_M}post_attention_layernorm.weight", f"{_H}post_attention_layernorm.weight", "d"),
    _row(f"{_M}pre_mlp_layernorm.weight", f"{_H}pre_mlp_layernorm.weight", "d"),
    # Dense layers.
    _row(
        f"{_M}mlp.linear_fc1.weight", _names(f"{_H}mlp.", _GATE_UP), "ffn d", rows, layers="dense"
    ),
    _row(f"{_M}mlp.linear_fc2.weight", f"{_H}mlp.down_proj.weight", "d ffn", layers="dense"),
    # MoE layers.
    _row(f"{_M}mlp.router.weight", f"{_H}mlp.router.gate.weight", "experts d", layers="moe"),
    _row(
        f"{_M}mlp.router.expert_bias",
        f"{_H}mlp.expert_bias",
        "experts",
        layers="moe",
        keep_fp32=True,
    ),
    _row(f"{_EXPERTS}linear_fc1.weight", _names(_HF_EXPERT, _GATE_UP), "moe d", rows, layers="moe"),
    _row(f"{_EXPERTS}linear_fc2.weight", f"{_HF_EXPERT}down_proj.weight", "d moe", layers="moe"),
    _row(
        f"{_SHARED}linear_fc1.weight", _names(_HF_SHARED, _GATE_UP), "shared d", rows, layers="moe"
    ),
    _row(f"{_SHARED}linear_fc2.weight", f"{_HF_SHARED}down_proj.weight", "d shared", layers="moe"),
    _row(f"{_M}post_mlp_layernorm.weight", f"{_H}post_mlp_layernorm.weight", "d"),
    _row("decoder.final_layernorm.weight", "model.norm.weight", "d"),
    _row("output_layer.weight", "lm_head.weight", "vocab d"),
)

# The experts as transformers (>= 5.2) holds them in memory: instead of the rows with {e} above.
STACKED_EXPERTS: tuple[Mapping, ...] = (
    _row(
        f"{_EXPERTS}linear_fc1.weight",
        f"{_H}mlp.experts.gate_up_proj",
        "experts 2moe d",
        stacked,
        layers="moe",
    ),
    _row(
        f"{_EXPERTS}linear_fc2.weight",
        f"{_H}mlp.experts.down_proj",
        "experts d moe",
        stacked,
        layers="moe",
    ),
)

# What only Megatron has: the momentum of the expert bias (fp32, zero in a model from elsewhere) ...
MOMENTUM = Mapping(
    f"{_M}mlp.router.expert_bias_momentum", (), ("experts",), layers="moe", keep_fp32=True
)
# ... and the (empty) extra state of its linear layers.
EXTRA_STATE: tuple[tuple[str, Layers], ...] = (
    (f"{_ATTENTION}linear_qkv._extra_state", "all"),
    (f"{_ATTENTION}linear_proj._extra_state", "all"),
    (f"{_M}mlp.linear_fc1._extra_state", "dense"),
    (f"{_M}mlp.linear_fc2._extra_state", "dense"),
    (f"{_SHARED}linear_fc1._extra_state", "moe"),
    (f"{_SHARED}linear_fc2._extra_state", "moe"),
)


@dataclass(frozen=True)
class Entry:
    """A row of the table for one layer of one model.

    Attributes:
        megatron: Key of the Megatron tensor.
        shape: Its whole shape.
        blocks: What it is made of; none for :data:`MOMENTUM`.
        hf: Shape of each Hugging Face tensor.
        keep_fp32: See :class:`Mapping`.
    """

    megatron: str
    shape: Shape
    blocks: list[Block] = field(repr=False)
    hf: dict[str, Shape]
    keep_fp32: bool = False

    def clip(self, start: Shape, shape: Shape) -> list[Block]:
        """The blocks of a part of the tensor."""
        # They follow one another in row-major order.  If none begins where the part does, the one
        # before reaches into it.
        begin = start[0]
        first = bisect_left(self.blocks, begin, key=lambda block: block.megatron_start[0])
        if first == len(self.blocks) or self.blocks[first].megatron_start[0] != begin:
            first = max(first - 1, 0)
        found = []
        for block in islice(self.blocks, first, None):
            if block.megatron_start[0] >= start[0] + shape[0]:
                break
            if (clipped := block.clip(start, shape)) is not None:
                found.append(clipped)
        return found


def get_dimensions(config: TrinityConfig) -> dict[str, int]:
    """The sizes that shapes in the table are written in."""
    head, moe = config.kv_channels, config.moe_ffn_hidden_size or 0
    assert head is not None and config.num_query_groups is not None
    return {
        "vocab": config.vocab_size,
        "d": config.hidden_size,
        "q": config.num_attention_heads * head,
        "kv": config.num_query_groups * head,
        "head": head,
        "ffn": config.ffn_hidden_size or 0,
        "experts": config.num_moe_experts or 0,
        "moe": moe,
        "2moe": 2 * moe,
        "shared": config.moe_shared_expert_intermediate_size or 0,
    }


def resolve(config: TrinityConfig, *, stacked_experts: bool = False) -> list[Entry]:
    """The table for a model, layer by layer in the order of a Hugging Face checkpoint.

    Args:
        config: The model.
        stacked_experts: The experts on the Hugging Face side are stacked (as transformers holds
            them in memory) instead of one by one (as on the hub).
    """
    replaced = {mapping.megatron: mapping for mapping in STACKED_EXPERTS if stacked_experts}
    dimensions = get_dimensions(config)
    entries = []
    for mapping, layer in _walk(config, TABLE):
        mapping = replaced.get(mapping.megatron, mapping)
        entries.append(_entry(mapping, layer, dimensions, config))
    return entries


def resolve_momentum(config: TrinityConfig) -> list[Entry]:
    """The momentum tensors of a model, which no Hugging Face tensor holds."""
    dimensions = get_dimensions(config)
    return [
        _entry(mapping, layer, dimensions, config) for mapping, layer in _walk(config, [MOMENTUM])
    ]


def resolve_extra_state(config: TrinityConfig) -> list[str]:
    """Keys of the extra state objects of a model."""
    return [
        key.replace("*", str(layer))
        for layer in range(config.num_layers)
        for key, layers in EXTRA_STATE
        if _has(config, layer, layers)
    ]


def _has(config: TrinityConfig, layer: int, layers: Layers) -> bool:
    return layers == "all" or (layers == "dense") == (layer < config.num_dense_layers)


def _walk(config: TrinityConfig, table: Sequence[Mapping]) -> Iterator[tuple[Mapping, int | None]]:
    """Rows in order, those with ``*`` once for every layer that has them."""
    per_layer = [mapping for mapping in table if "*" in mapping.megatron]
    done = False
    for mapping in table:
        if "*" not in mapping.megatron:
            yield mapping, None
        elif not done:
            done = True
            for layer in range(config.num_layers):
                for each in per_layer:
                    if _has(config, layer, each.layers):
                        yield each, layer


def _entry(
    mapping: Mapping, layer: int | None, dimensions: dict[str, int], config: TrinityConfig
) -> Entry:
    def fill(name: str, expert: int | None = None) -> str:
        name = name.replace("*", str(layer))
        return name if expert is None else name.replace("{e}", str(expert))

    shapes = [tuple(dimensions[size] for size in text.split()) for text in mapping.shapes]
    transform = mapping.transform
    if transform is query_groups:
        transform = partial(query_groups, num_query_groups=config.num_query_groups)
    if not mapping.hf:
        return Entry(fill(mapping.megatron), shapes[0], [], {}, mapping.keep_fp32)
    if "{e}" in mapping.hf[0]:
        experts = range(dimensions["experts"])
        names = [[fill(name, e) for name in mapping.hf] for e in experts]
        shape, blocks = stack([transform(each, shapes) for each in names])
    else:
        names = [[fill(name) for name in mapping.hf]]
        shape, blocks = transform(names[0], shapes)
    check_tiling(shape, blocks)
    hf = {name: size for each in names for name, size in zip(each, shapes, strict=True)}
    return Entry(fill(mapping.megatron), shape, blocks, hf, mapping.keep_fp32)
