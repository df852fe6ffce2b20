"""Names, types and places of the tensors in a GGUF file of a Trinity model.

Source: llama.cpp, ``src/models/afmoe.cpp`` (what is loaded) and ``conversion/afmoe.py``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

from trinity_megatron.checkpoint.param_mapping import Entry
from trinity_megatron.checkpoint.transforms import Shape

GgufType = Literal["F32", "BF16", "Q8_0"]

# Numbers that share a scale, and the bytes of them with it.
Q8_BLOCK, Q8_BYTES = 32, 34
# Tensors begin at multiples of this.  Source: the GGUF specification, general.alignment.
ALIGNMENT = 32

_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_mlp_layernorm.weight": "ffn_norm.weight",
    "post_mlp_layernorm.weight": "post_ffw_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.gate_proj.weight": "attn_gate.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.router.gate.weight": "ffn_gate_inp.weight",
    "mlp.expert_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_ROUTER = "ffn_gate_inp.weight"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        name: In llama.cpp's words.
        shape: With the experts first.
        type: How its numbers are stored.
        offset: First byte, counted from the first tensor.
    """

    name: str
    shape: Shape
    type: GgufType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the last dimension."""
        return _row_bytes(self.shape[-1], self.type)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor lies.

    Attributes:
        tensor: The tensor of the file.
        expert: Its number in that; 0 if it is the whole.
        shape: Of the Hugging Face tensor.
    """

    tensor: GgufTensor
    expert: int
    shape: Shape

    @property
    def offset(self) -> int:
        """First byte, counted from the first tensor of the file."""
        return self.tensor.offset + self.expert * prod(self.shape[:-1]) * self.tensor.row_bytes


def gguf_name(hf_name: str) -> tuple[str, int]:
    """Name in the file and number of the expert (0 outside the experts) of a tensor."""
    if hf_name in _WHOLE:
        return _WHOLE[hf_name], 0
    layer = _LAYER.fullmatch(hf_name)
    assert layer is not None, hf_name
    if expert := _EXPERT.fullmatch(layer[2]):
        return f"blk.{layer[1]}.ffn_{expert[2]}_exps.weight", int(expert[1])
    return f"blk.{layer[1]}.{_IN_LAYER[layer[2]]}", 0


def lay_out(
    entries: Iterable[Entry], num_experts: int, wanted: GgufType
) -> tuple[list[GgufTensor], dict[str, Place]]:
    """The tensors of the file in order, and where each Hugging Face tensor lies.

    Args:
        entries: The tensors of the model.
        num_experts: Of an MoE layer.
        wanted: Type of the matrices.  Vectors and routers are F32; a matrix whose rows are no
            multiple of 32 numbers is BF16 instead of Q8_0.
    """
    tensors: dict[str, GgufTensor] = {}
    places: dict[str, Place] = {}
    end = 0
    for entry in entries:
        for hf_name, shape in entry.hf.items():
            name, expert = gguf_name(hf_name)
            if name not in tensors:
                whole = (num_experts, *shape) if name.endswith("_exps.weight") else shape
                tensors[name] = GgufTensor(name, whole, _choose_type(name, whole, wanted), end)
                end += -(-tensors[name].num_bytes // ALIGNMENT) * ALIGNMENT
            places[hf_name] = Place(tensors[name], expert, shape)
    return list(tensors.values()), places


def _choose_type(name: str, shape: Shape, wanted: GgufType) -> GgufType:
    if len(shape) == 1 or name.endswith(_ROUTER):
        return "F32"
    return "BF16" if wanted == "Q8_0" and shape[-1] % Q8_BLOCK else wanted


def _row_bytes(numbers: int, kind: GgufType) -> int:
    if kind == "Q8_0":
        return numbers // Q8_BLOCK * Q8_BYTES
    return numbers * (4 if kind == "F32" else 2)
