"""A whole export in block FP8: layout, values, resumption, and what it costs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference.hf_random import read_tensors
from tests.unit_tests.export.export_cases import make_run, tokens
from trinity_megatron.checkpoint import megatron_export, staging
from trinity_megatron.checkpoint.convert import export_hf, hf_to_megatron, open_run
from trinity_megatron.checkpoint.hf_writer import HFWriter
from trinity_megatron.checkpoint.transformers_model import load_transformers_model
from trinity_megatron.errors import UserError
from trinity_megatron.evaluation.loss_difference import compare_losses, token_losses
from trinity_megatron.export.fp8_block import FP8, dequantise_blocks, quantise_blocks
from trinity_megatron.export.fp8_encoding import Fp8BlockEncoding, Fp8BlockWriter
from trinity_megatron.export.read_back import read_back, read_safetensors


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in parts of about 3,000 numbers, i.e. of a few rows each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_export, "_MAX_PART_BYTES", 6000)
        return make_run(tmp_path_factory.mktemp("run"))


def export(run: Path, out: Path) -> dict[str, torch.Tensor]:
    export_hf(open_run(run), out, max_shard_size="200KB", encoding=Fp8BlockEncoding())
    return read_tensors(out)


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """The export of the run, which no test changes."""
    export(run, run.parent / "fp8")
    return run.parent / "fp8"


def test_every_projection_and_nothing_else(run: Path, exported: Path) -> None:
    found, original = read_tensors(exported), read_tensors(run.parent / "hf")
    quantised = {name for name, values in found.items() if values.dtype == FP8}
    assert {name.rsplit(".", 2)[1] for name in quantised} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    # 5 of attention, 3 of the dense MLP, and 3 of each of 4 experts and the shared expert.
    assert len(quantised) == 4 * 5 + 3 + 3 * 3 * (4 + 1)
    assert found.keys() == original.keys() | {f"{name}_scale" for name in quantised}
    for name, values in original.items():
        if name in quantised:
            # The tensor at once, where the export has seen a few rows at a time.
            numbers, scale = quantise_blocks(values)
            assert torch.equal(found[name].view(torch.uint8), numbers.view(torch.uint8)), name
            assert torch.equal(found[f"{name}_scale"], scale), name
        else:
            assert torch.equal(found[name], values) and found[name].dtype == values.dtype, name


def test_files_beside_the_weights(run: Path, exported: Path) -> None:
    original = run.parent / "hf"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (exported / name).read_bytes() == (original / name).read_bytes()
    fields = json.loads((exported / "config.json").read_text())
    quantization = fields.pop("quantization_config")
    assert fields == json.loads((original / "config.json").read_text())
    assert quantization["quant_method"] == "compressed-tensors"
    routers = [f"model.layers.{layer}.mlp.router" for layer in (1, 2, 3)]
    assert quantization["ignore"] == [
        *(name for router in routers for name in (router, f"{router}.gate")),
        "lm_head",
    ]
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(exported / file)
    assert index["weight_map"].keys() == read_tensors(exported).keys()


def test_an_interrupted_export_goes_on(
    run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_JOB_BYTES", 100_000)
    expected = read_tensors(exported)
    synced, real = [0], Fp8BlockWriter.sync

    def stop(self: Fp8BlockWriter, names: Any) -> None:
        synced[0] += 1
        if synced[0] == 8:
            raise KeyboardInterrupt
        real(self, names)

    monkeypatch.setattr(Fp8BlockWriter, "sync", stop)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "fp8")
    finished = list((tmp_path / "fp8.incomplete" / "journal").glob("*.done"))
    assert not (tmp_path / "fp8").exists() and finished
    monkeypatch.setattr(Fp8BlockWriter, "sync", real)
    found = export(run, tmp_path / "fp8")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name].view(torch.uint8), values.view(torch.uint8)), name


def test_memory_holds_only_bands_that_are_not_whole(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    largest, real = [0], Fp8BlockWriter._collect

    def watch(self: Fp8BlockWriter, *args: Any) -> None:
        real(self, *args)
        rows = sum(
            len(band.values) for bands in list(self._open.values()) for band in bands.values()
        )
        largest[0] = max(largest[0], rows)

    monkeypatch.setattr(Fp8BlockWriter, "_collect", watch)
    export(run, tmp_path / "fp8")
    # In two threads: q, gate, k and v of a layer, two bands each at most.
    assert 0 < largest[0] <= 2 * 4 * 2 * 128
    assert "Sizes of 96, 160, 192, 200 are not multiples of 128" in caplog.text


def test_what_comes_back(run: Path, exported: Path) -> None:
    opened = open_run(run)
    model = load_transformers_model(
        opened.source, opened.config, name="run", assets=opened.assets
    ).float()
    back = read_back(exported, opened.config)
    batch = tokens()
    with torch.no_grad():
        expected, logits = model(batch).logits, back(batch).logits
    difference = (logits - expected).double().pow(2).mean().sqrt()
    # Each weight is off by 2**-4 at most, uniformly: 2.5% of its size in the mean; the errors of
    # eight matrices on the way add up as squares.
    assert 1e-3 < difference / expected.double().std() < 0.1
    result = compare_losses(token_losses(model, batch), token_losses(back, batch))
    assert result.num_tokens == 2 * 59 and 0 < abs(result.difference) < 0.05
    exact = dict(read_safetensors(run.parent / "hf"))
    for name, values in read_safetensors(exported):
        if exact[name].dim() == 2 and name.endswith("_proj.weight"):
            assert torch.equal(values, dequantise_blocks(*quantise_blocks(exact[name]))), name
        else:
            assert torch.equal(values, exact[name]), name


def test_it_cannot_be_trained_on(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantised"):
        hf_to_megatron(exported, tmp_path / "megatron")


def test_bf16_is_what_convert_writes(run: Path, tmp_path: Path) -> None:
    export_hf(open_run(run), tmp_path / "bf16")
    for path in (run.parent / "hf").iterdir():
        assert (tmp_path / "bf16" / path.name).read_bytes() == path.read_bytes()


def test_a_tensor_without_its_scale_is_said(exported: Path, tmp_path: Path) -> None:
    found = read_tensors(exported)
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({name: found[name]}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="has no .*down_proj.weight_scale"):
        dict(read_safetensors(tmp_path))


def test_a_missing_tensor_is_said(run: Path, exported: Path, tmp_path: Path) -> None:
    config = open_run(run).config
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    for path in sorted(exported.glob("*.safetensors"))[1:]:
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match="are missing"):
        read_back(tmp_path, config)


def test_the_writer_of_files_takes_fp8(tmp_path: Path) -> None:
    from trinity_megatron.checkpoint.hf_writer import build_header
    from trinity_megatron.checkpoint.transforms import Block

    values = torch.arange(256, dtype=torch.uint8).view(FP8).view(16, 16)
    header = build_header({"a": (FP8, (16, 16)), "b": (torch.float32, (3,))})
    writer = HFWriter(tmp_path, {"model.safetensors": header})
    writer.write(Block("a", (0, 0), (16, 16), (0, 0), (16, 16)), values)
    writer.close()
    found = load_file(tmp_path / "model.safetensors")
    assert found["a"].dtype == FP8 and torch.equal(
        found["a"].view(torch.uint8), values.view(torch.uint8)
    )
