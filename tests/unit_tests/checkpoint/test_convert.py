"""Whole checkpoints: transformers -> Megatron -> transformers, bytes, logits and gradients."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AfmoeForCausalLM

from tests.reference.hf_random import (
    NUM_CONFIGS,
    random_config,
    random_model,
    random_tokens,
    read_tensors,
    save_as_bf16,
)
from trinity_megatron.checkpoint import load_hf_model, save_hf_model
from trinity_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from trinity_megatron.checkpoint.live_model import LiveModel
from trinity_megatron.checkpoint.model_io import load_megatron_model
from trinity_megatron.checkpoint.param_mapping import resolve
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.checkpoint.transformers_model import load_transformers_model

pytestmark = pytest.mark.usefixtures("one_rank")


def assert_same_files(a: Path, b: Path) -> None:
    """The same names and the same bytes."""
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    different = [p.name for p in a.iterdir() if p.read_bytes() != (b / p.name).read_bytes()]
    assert not different


def positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1]).expand_as(tokens)


@pytest.mark.parametrize("seed", range(NUM_CONFIGS))
def test_random_models(seed: int, tmp_path: Path) -> None:
    config = random_config(seed)
    twin = random_model(config, seed)
    tokens = random_tokens(config, seed)
    hf, megatron, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    # Some in one file, most in several.
    twin.save_pretrained(hf, max_shard_size="5GB" if seed % 4 == 0 else "150KB")
    model = load_hf_model(hf).eval()
    with torch.no_grad():
        expected = twin(tokens).logits
        logits = model(tokens, positions(tokens), None)
    assert logits.shape == (*tokens.shape, config.vocab_size)
    # fp32 sums in another order; the bound of the specification of this conversion.
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    hf_to_megatron(hf, megatron)
    megatron_to_hf(megatron, back)
    assert_same_files(hf, back)
    biases = {n: t for n, t in read_tensors(back).items() if n.endswith("expert_bias")}
    assert biases and all(t.dtype == torch.float32 and t.abs().max() > 0 for t in biases.values())
    with torch.no_grad():
        loaded = load_megatron_model(megatron).eval()(tokens, positions(tokens), None)
    assert torch.equal(loaded, logits)


def test_the_configs_cover_what_they_should() -> None:
    configs = [random_config(seed) for seed in range(NUM_CONFIGS)]
    ratios = {c.num_attention_heads // c.num_key_value_heads for c in configs}
    assert {1, 8} <= ratios and {c.num_dense_layers for c in configs} == {0, 1, 2, 3}
    wide = {c.hidden_size == c.num_attention_heads * c.head_dim for c in configs}
    assert wide == {True, False} and {c.mup_enabled for c in configs} == {True, False}
    assert {16, 128} <= {c.head_dim for c in configs}
    assert max(c.num_hidden_layers for c in configs) >= 10
    assert {1, 8} <= {c.num_experts_per_tok for c in configs}


@pytest.fixture
def bf16(tmp_path: Path) -> Path:
    """A checkpoint as the hub has it, with a file that we know nothing of."""
    save_as_bf16(random_model(random_config(1), 1), tmp_path / "hf", max_shard_size="100KB")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path / "hf"


def test_bf16_keeps_the_bias_in_fp32(bf16: Path, tmp_path: Path) -> None:
    hf_to_megatron(bf16, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_files(bf16, tmp_path / "back")
    dtypes = {n: t.dtype for n, t in read_tensors(tmp_path / "back").items()}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert all((t == torch.float32) == n.endswith("expert_bias") for n, t in dtypes.items())
    model = load_hf_model(bf16, dtype=torch.bfloat16)
    biases = [p for n, p in model.named_parameters() if n.endswith("expert_bias")]
    assert biases and all(bias.dtype == torch.float32 for bias in biases)


def test_stacked_experts_are_read(bf16: Path, tmp_path: Path) -> None:
    twin = AfmoeForCausalLM.from_pretrained(bf16, dtype=torch.float32)
    stacked, megatron = tmp_path / "stacked", tmp_path / "megatron"
    twin.save_pretrained(stacked, save_original_format=False)
    names = read_tensors(stacked)
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    hf_to_megatron(stacked, megatron)
    megatron_to_hf(megatron, tmp_path / "back")  # in the layout of the hub
    exported, expected = read_tensors(tmp_path / "back"), read_tensors(bf16)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[n], expected[n].float()) for n in expected)


def test_a_bias_in_bf16_is_widened_and_said(
    bf16: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in bf16.glob("*.safetensors"):
        tensors = {n: t.bfloat16() for n, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    hf_to_megatron(bf16, tmp_path / "megatron")
    assert "widened to float32" in caplog.text
    tensors = TorchDistReader(tmp_path / "megatron").model_tensors()
    biases = {key: dtype for key, (dtype, _) in tensors.items() if "expert_bias" in key}
    assert set(biases.values()) == {torch.float32}


def test_models_in_memory_go_back(bf16: Path, tmp_path: Path) -> None:
    model = load_hf_model(bf16, dtype=torch.bfloat16)
    save_hf_model(model, tmp_path / "back")
    exported, expected = read_tensors(tmp_path / "back"), read_tensors(bf16)
    assert exported.keys() == expected.keys()
    assert all(
        torch.equal(exported[n], expected[n]) and exported[n].dtype == expected[n].dtype
        for n in expected
    )
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    twin = AfmoeForCausalLM.from_pretrained(tmp_path / "back", **options)
    again = AfmoeForCausalLM.from_pretrained(bf16, **options)
    tokens = random_tokens(random_config(1), 1)
    with torch.no_grad():
        assert torch.equal(twin.eval()(tokens).logits, again.eval()(tokens).logits)


def test_sequential_experts_share_the_table(bf16: Path, one_rank: None) -> None:
    # Megatron's own expert implementation, one module per expert, as the other side of the table.
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    from trinity_megatron.model.layer_specs import get_trinity_layer_spec

    whole = load_hf_model(bf16).eval()
    spec = get_trinity_layer_spec(whole.config)
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

    def experts(num_local_experts: int, config: object, **options: object) -> SequentialMLP:
        return SequentialMLP(num_local_experts, config, linears, options["pg_collection"])

    for layer in spec.layer_specs:
        moe = getattr(layer.submodules.mlp, "keywords", {}).get("submodules")
        if hasattr(moe, "experts"):
            moe.experts = experts
    model = GPTModel(
        whole.config,
        spec,
        vocab_size=whole.config.vocab_size,
        max_sequence_length=64,
        position_embedding_type="rope",
        rotary_base=whole.config.rotary_base,
        share_embeddings_and_output_weights=False,
    )
    one, other = LiveModel(whole), LiveModel(model)
    keys = {key for key in one.model_tensors() if not key.endswith("momentum")}
    assert {k: one.model_tensors()[k] for k in keys} == {k: other.model_tensors()[k] for k in keys}


@pytest.mark.parametrize("seed", [3, 7, 12])
def test_loss_and_gradients_equal_transformers(seed: int, tmp_path: Path) -> None:
    config = random_config(seed)
    twin = random_model(config, seed).train()
    twin.save_pretrained(tmp_path / "hf")
    model = load_hf_model(tmp_path / "hf").train()
    tokens = random_tokens(config, seed)
    labels = tokens.roll(-1, dims=1)
    loss = model(tokens, positions(tokens), None, labels=labels).mean()
    loss.backward()
    logits = twin(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-4)
    # The gradients take the way of the weights: through the table.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.grad
    gradients = LiveModel(model)
    theirs = dict(twin.named_parameters())
    compared = set()
    for entry in resolve(model.config, stacked_experts=True):
        for parts in gradients.parts(entry.megatron):
            values = gradients.read(parts)
            for block in entry.clip(parts[0].start, tuple(values.shape)):
                if theirs[block.hf_name].grad is None:
                    assert block.hf_name.endswith("expert_bias")
                    continue
                gradient = block.hf_view(theirs[block.hf_name].grad)
                ours = block.megatron_view(values, parts[0].start)
                scale = theirs[block.hf_name].grad.abs().max()
                assert (ours - gradient).abs().max() <= 1e-4 * scale, block
                compared.add(block.hf_name)
    assert compared == {n for n, p in theirs.items() if p.grad is not None}


def test_generation_uses_the_same_model(bf16: Path, tmp_path: Path) -> None:
    from trinity_megatron.checkpoint.hf_assets import find_assets
    from trinity_megatron.checkpoint.model_args import config_from_args

    hf_to_megatron(bf16, tmp_path / "megatron")
    source = TorchDistReader(tmp_path / "megatron")
    assets = find_assets(tmp_path / "megatron")
    config = config_from_args(source.args)
    ours = load_transformers_model(source, config, name="it", assets=assets)
    theirs = AfmoeForCausalLM.from_pretrained(bf16, dtype=torch.bfloat16)
    mine, stored = dict(ours.named_parameters()), read_tensors(bf16)
    assert mine.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        # transformers rounds the bias when it loads in bf16; here it stays what was trained.
        expected = stored[name] if name.endswith("expert_bias") else parameter
        assert torch.equal(mine[name], expected) and mine[name].dtype == expected.dtype, name


def test_a_checkpoint_is_a_preset(bf16: Path, tmp_path: Path) -> None:
    from trinity_megatron.model.presets import get_preset

    hf_to_megatron(bf16, tmp_path / "megatron")
    given = json.loads((bf16 / "config.json").read_text())
    for folder in (bf16, tmp_path / "megatron"):
        model = get_preset(str(folder)).model
        assert model["num_moe_experts"] == given["num_experts"]
        assert model["window_size"] == (given["sliding_window"] - 1, 0)
