"""The GGUF file: every number, field and token, read by the package gguf."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers

from tests.reference.hf_random import read_tensors
from tests.unit_tests.export.export_cases import MODEL, make_run, make_tokenizer, tokens
from trinity_megatron.checkpoint import megatron_export, staging
from trinity_megatron.checkpoint.convert import open_run
from trinity_megatron.errors import UserError
from trinity_megatron.evaluation.loss_difference import compare_losses, token_losses
from trinity_megatron.export.gguf_file import FILE_NAME, GgufWriter, write_gguf
from trinity_megatron.export.gguf_layout import gguf_name
from trinity_megatron.export.gguf_tokenizer import check_tokenizer
from trinity_megatron.export.read_back import read_back, read_gguf_tensors

gguf: Any = pytest.importorskip("gguf", reason="the package gguf is not installed")
# A row of 72 numbers cannot be cut into blocks of 32.
SIZES = {"moe_intermediate_size": 72}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_export, "_MAX_PART_BYTES", 6000)
        return make_run(tmp_path_factory.mktemp("run"), **SIZES)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_every_number(run: Path, tmp_path: Path, kind: Any) -> None:
    opened = open_run(run)
    write_gguf(opened, tmp_path / "out", kind=kind)
    found = dict(read_gguf_tensors(tmp_path / "out" / FILE_NAME, opened.config))
    original = read_tensors(run.parent / "hf")
    assert found.keys() == original.keys()
    for name, values in original.items():
        expected = values.float()
        is_matrix = values.dim() == 2 and "router" not in name
        if kind == "Q8_0" and is_matrix and values.shape[1] % 32 == 0:
            blocks = expected.unflatten(1, (-1, 32))
            # Half a step, where the scale is rounded to fp16.
            bound = blocks.abs().amax(-1, keepdim=True) * (0.5 / 127 + 2**-10)
            difference = found[name].unflatten(1, (-1, 32)) - blocks
            assert (difference.abs() <= bound).all() and (difference != 0).any(), name
        else:  # the checkpoint is in bf16, and the bias in fp32
            assert torch.equal(found[name], expected), name


def test_types_and_fields(run: Path, tmp_path: Path) -> None:
    write_gguf(open_run(run), tmp_path / "out", kind="Q8_0")
    reader = gguf.GGUFReader(tmp_path / "out" / FILE_NAME)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.1.ffn_gate_inp.weight"] == types["blk.1.exp_probs_b.bias"] == "F32"
    assert types["blk.1.ffn_gate_exps.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.1.ffn_down_exps.weight"] == "BF16" and types["output_norm.weight"] == "F32"
    known = {
        name.format(bid=layer)
        for name in gguf.TENSOR_NAMES.values()
        for layer in range(MODEL["num_hidden_layers"])
    }
    assert {name.rsplit(".", 1)[0] for name in types} <= known
    fields = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "afmoe",
        "afmoe.block_count": 4,
        "afmoe.context_length": 256,
        "afmoe.embedding_length": 160,
        "afmoe.feed_forward_length": 200,
        "afmoe.attention.head_count": 4,
        "afmoe.attention.head_count_kv": 2,
        "afmoe.attention.key_length": 48,
        "afmoe.attention.value_length": 48,
        "afmoe.attention.sliding_window": 16,
        "afmoe.rope.dimension_count": 48,
        "afmoe.rope.freq_base": 10000.0,
        "afmoe.vocab_size": 303,
        "afmoe.leading_dense_block_count": 1,
        "afmoe.expert_count": 4,
        "afmoe.expert_used_count": 2,
        "afmoe.expert_shared_count": 1,
        "afmoe.expert_feed_forward_length": 72,
        "afmoe.expert_gating_func": 2,
        "afmoe.expert_weights_norm": True,
        "afmoe.expert_weights_scale": 2.0,
    }
    assert {name: fields.get(name) for name in expected} == expected
    assert fields["afmoe.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_tokenizer(run: Path, tmp_path: Path) -> None:
    write_gguf(open_run(run), tmp_path / "out", kind="BF16")
    reader = gguf.GGUFReader(tmp_path / "out" / FILE_NAME)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    ours = Tokenizer.from_file(str(run.parent / "hf" / "tokenizer.json"))
    names = [ours.id_to_token(number) for number in range(ours.get_vocab_size())]
    assert fields["tokenizer.ggml.tokens"] == [*names, "[PAD300]", "[PAD301]", "[PAD302]"]
    kinds = fields["tokenizer.ggml.token_type"]
    # <|endoftext|> and the two tokens of ChatML are control tokens.
    assert (set(kinds[:3]), set(kinds[3:300]), set(kinds[300:])) == ({3}, {1}, {5})
    merges = json.loads(ours.to_str())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "afmoe")
    for kind in ("bos", "eos", "padding"):
        assert fields[f"tokenizer.ggml.{kind}_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_an_interrupted_export_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_JOB_BYTES", 100_000)
    write_gguf(open_run(run), tmp_path / "whole", kind="BF16")
    synced, real = [0], GgufWriter.sync

    def stop(self: GgufWriter, names: Any) -> None:
        synced[0] += 1
        if synced[0] == 6:
            raise KeyboardInterrupt
        real(self, names)

    monkeypatch.setattr(GgufWriter, "sync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(open_run(run), tmp_path / "out", kind="BF16")
    assert list((tmp_path / "out.incomplete" / "journal").glob("*.done"))
    monkeypatch.setattr(GgufWriter, "sync", real)
    write_gguf(open_run(run), tmp_path / "out", kind="BF16")
    whole, out = (tmp_path / name / FILE_NAME for name in ("whole", "out"))
    assert whole.read_bytes() == out.read_bytes()


def test_what_comes_back(run: Path, tmp_path: Path) -> None:
    opened = open_run(run)
    write_gguf(opened, tmp_path / "out", kind="BF16")
    back, same = (
        read_back(tmp_path / "out", opened.config),
        read_back(run.parent / "hf", opened.config),
    )
    result = compare_losses(token_losses(same, tokens()), token_losses(back, tokens()))
    assert result.difference == result.largest == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"global_attn_every_n_layers": 2}, "global_attn_every_n_layers=2"),
        ({"mup_enabled": False}, "scale_embeddings=False"),
    ],
)
def test_what_llama_cpp_does_not_compute(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path, num_experts=2, **fields)
    with pytest.raises(UserError, match=words):
        write_gguf(open_run(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    check_tokenizer(tokenizer, tmp_path)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(UserError, match="differently from Trinity's pre-tokenizer"):
        check_tokenizer(tokenizer, tmp_path)


def test_names_of_experts() -> None:
    assert gguf_name("model.layers.12.mlp.experts.7.up_proj.weight") == (
        "blk.12.ffn_up_exps.weight",
        7,
    )
    assert gguf_name("lm_head.weight") == ("output.weight", 0)
