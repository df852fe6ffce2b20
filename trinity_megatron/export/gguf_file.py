"""``trinity-megatron export --format gguf``: one file that llama.cpp loads, streamed."""

import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from trinity_megatron.checkpoint.block_stream import BlockWriter, write_blocks
from trinity_megatron.checkpoint.convert import Run, log_rate
from trinity_megatron.checkpoint.page_cache import WriteBehind
from trinity_megatron.checkpoint.tensor_checks import match_tensors
from trinity_megatron.checkpoint.transforms import Block
from trinity_megatron.errors import UserError
from trinity_megatron.export.gguf_layout import ALIGNMENT, GgufTensor, GgufType, Place, lay_out
from trinity_megatron.export.gguf_package import import_gguf
from trinity_megatron.export.gguf_tokenizer import add_tokenizer
from trinity_megatron.model.config import TrinityConfig

logger = logging.getLogger(__name__)

FILE_NAME = "model.gguf"
# llama.cpp has RoPE in three of four layers and scales the embeddings, whatever a file says.
_EVERY = 4
_FILE_TYPES = {"F32": "ALL_F32", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}


def write_gguf(run: Run, out: Path, *, kind: GgufType = "BF16") -> None:
    """Write the model of a run as a GGUF file.

    Args:
        run: The checkpoint.
        out: Folder to create; the file in it is ``model.gguf``.
        kind: Type of the matrices.

    Raises:
        UserError: The package gguf is missing, the run has no tokenizer, or llama.cpp would compute
            or tokenize something else.
        OSError: The folder cannot be written.
    """
    begin = time.monotonic()
    gguf = import_gguf()
    config = run.config
    tokenizer = run.tokenizer or (run.assets.folder if run.assets else None)
    if tokenizer is None or not (tokenizer / "tokenizer.json").is_file():
        raise UserError(f"{run.checkpoint} has no tokenizer. Remedy: --tokenizer DIR.")
    entries = match_tensors(run.source.model_tensors(), config, assets=run.assets, name=run.name)
    check_model(config)
    tensors, places = lay_out(entries, config.num_moe_experts or 0, kind)
    size = sum(tensor.num_bytes for tensor in tensors)

    def prepare(folder: Path) -> BlockWriter:
        header = _build_header(gguf, folder, config, tokenizer, tensors, kind)
        return GgufWriter(gguf, folder / FILE_NAME, header, tensors, places)

    num_bytes = write_blocks(
        run.source,
        entries,
        out,
        name=run.name,
        state=run.fingerprint("gguf", kind),
        prepare=prepare,
        description="to GGUF",
        num_bytes=size,
    )
    log_rate(run.checkpoint, out / FILE_NAME, num_bytes, time.monotonic() - begin)


def check_model(config: TrinityConfig) -> None:
    """Refuse a model that llama.cpp's afmoe does not compute.

    Raises:
        UserError: Names the field and its value.
    """
    remedy = "Remedy: --format bf16, and vLLM or transformers."
    if config.global_attn_every_n_layers != _EVERY:
        raise UserError(
            f"global_attn_every_n_layers={config.global_attn_every_n_layers}: llama.cpp leaves "
            f"RoPE out in every {_EVERY}th layer. {remedy}"
        )
    if not config.scale_embeddings:
        raise UserError(
            f"scale_embeddings={config.scale_embeddings}: llama.cpp always scales the embeddings. "
            f"{remedy}"
        )


def _build_header(
    gguf: ModuleType,
    folder: Path,
    config: TrinityConfig,
    tokenizer: Path,
    tensors: Iterable[GgufTensor],
    kind: GgufType,
) -> bytes:
    """Everything that stands before the first tensor."""
    writer = gguf.GGUFWriter(None, "afmoe")
    writer.add_type(gguf.GGUFType.MODEL)
    _add_fields(gguf, writer, config)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[kind]))
    if kind == "Q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(gguf, writer, tokenizer, config.vocab_size)
    for tensor in tensors:
        # The package asks for a dtype of numpy, and looks at it only without a type of its own.
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            None,
            tensor.num_bytes,
            raw_dtype=gguf.GGMLQuantizationType[tensor.type],
        )
    path = folder / "header"
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.read_bytes()
    path.unlink()
    return header + bytes(-len(header) % ALIGNMENT)


def _add_fields(gguf: ModuleType, writer: Any, config: TrinityConfig) -> None:
    """Add the sizes of the model.  Source: llama.cpp, ``load_arch_hparams`` of afmoe."""
    moe, shared = config.moe_ffn_hidden_size or 0, config.moe_shared_expert_intermediate_size or 0
    assert config.window_size is not None and moe
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_query_groups)
    writer.add_key_length(config.kv_channels)
    writer.add_value_length(config.kv_channels)
    writer.add_rope_dimension_count(config.kv_channels)
    writer.add_rope_freq_base(float(config.rotary_base))
    writer.add_layer_norm_rms_eps(config.layernorm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_sliding_window(config.window_size[0] + 1)
    writer.add_leading_dense_block_count(config.num_dense_layers)
    writer.add_expert_count(config.num_moe_experts)
    writer.add_expert_used_count(config.moe_router_topk)
    writer.add_expert_shared_count(shared // moe)
    writer.add_expert_feed_forward_length(moe)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(config.moe_router_topk_scaling_factor or 1.0)


class GgufWriter:
    """Writes blocks of Hugging Face tensors to their places in a GGUF file.

    Args:
        gguf: The package.
        path: The file; what it already holds stays.
        header: What stands before the first tensor.
        tensors: Of the file, in order.
        places: Where each Hugging Face tensor lies.
    """

    def __init__(
        self,
        gguf: ModuleType,
        path: Path,
        header: bytes,
        tensors: list[GgufTensor],
        places: Mapping[str, Place],
    ) -> None:
        self._gguf, self._places, self._first_byte = gguf, places, len(header)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        end = tensors[-1].offset + tensors[-1].num_bytes
        os.ftruncate(self._file, len(header) + -(-end // ALIGNMENT) * ALIGNMENT)
        os.pwrite(self._file, header, 0)
        self._behind = WriteBehind(self._file)

    def write(self, block: Block, values: torch.Tensor) -> None:
        """See :class:`BlockWriter`."""
        place = self._places[block.hf_name]
        data = self._encode(values, place.tensor.type)
        if len(block.hf_shape) == 1:
            inside = block.hf_start[0] * (place.tensor.row_bytes // place.shape[-1])
        else:
            assert block.hf_shape[1:] == place.shape[1:], block
            inside = block.hf_start[0] * place.tensor.row_bytes
        at = self._first_byte + place.offset + inside
        written = 0
        while written < len(data):
            written += os.pwrite(self._file, data[written:], at + written)
        self._behind.wrote(written)

    def _encode(self, values: torch.Tensor, kind: GgufType) -> memoryview:
        if kind == "BF16":
            array = values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        else:
            array = values.float().contiguous().numpy()
        if kind == "Q8_0":
            array = self._gguf.quants.quantize(array, self._gguf.GGMLQuantizationType.Q8_0)
        return memoryview(array.reshape(-1)).cast("B")

    def sync(self, names: Iterable[str]) -> None:
        """See :class:`BlockWriter`."""
        self._behind.flush()

    def close(self) -> None:
        """See :class:`BlockWriter`."""
        os.close(self._file)
