"""Hugging Face checkpoints through every parallel layout and back; our training in transformers."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AfmoeConfig, AfmoeForCausalLM, AutoModelForCausalLM, AutoTokenizer

from tests.functional_tests.launch import Job, environment, sampled, train_in_order
from tests.reference.hf_random import random_model, read_tensors, save_as_bf16
from trinity_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
EP2, PP2 = "--expert-model-parallel-size 2", "--pipeline-model-parallel-size 2"
LAYOUTS = {"tp2": (2, TP2), "ep2": (2, EP2), "pp2": (2, PP2), "ep2_pp2": (4, f"{EP2} {PP2}")}
VERIFIED = sampled(LAYOUTS, "tp2")
# A step that moves nothing: neither optimizer, nor decay, nor the expert bias.
STILL = (
    "--train-iters 1 --lr 0 --min-lr 0 --decoupled-lr 0 --decoupled-min-lr 0 --weight-decay 0 "
    "--moe-router-bias-update-rate 0"
)


def make_checkpoint(folder: Path, *, vocab_size: int) -> None:
    """bf16 with the bias in fp32."""
    config = AfmoeConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=96,
        moe_intermediate_size=24,
        num_hidden_layers=6,
        num_dense_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=3,
        num_shared_experts=1,
        route_scale=2.5,
        sliding_window=16,
        max_position_embeddings=64,
        mup_enabled=True,
    )
    model = random_model(config, 5)
    save_as_bf16(model, folder, max_shard_size="200KB")


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The checkpoint loaded and saved in every layout, and 50 steps of a model of our own."""
    folder = tmp_path_factory.mktemp("layouts")
    hf, megatron = folder / "hf", folder / "megatron"
    make_checkpoint(hf, vocab_size=518)
    shutil.copytree(data / "tokenizer", hf, dirs_exist_ok=True)
    hf_to_megatron(hf, megatron)
    make_checkpoint(folder / "odd_hf", vocab_size=517)
    hf_to_megatron(folder / "odd_hf", folder / "odd_megatron")
    # fp32 holds what bf16 does: the way back gives the same numbers in another precision.
    start = f"{STILL} --preset {hf} --pretrained-checkpoint {megatron}"
    jobs = [
        (ranks, Job(name, f"{start} {layout}", folder / f"{name}_checkpoints"))
        for name, (ranks, layout) in LAYOUTS.items()
    ]
    odd = f"{STILL} --preset {folder}/odd_hf --pretrained-checkpoint {folder}/odd_megatron"
    jobs.insert(0, (2, Job("odd", f"{odd} {TP2}", folder / "odd_checkpoints")))
    jobs.insert(0, (2, Job("bf16", f"{start} {EP2} --bf16", folder / "bf16_checkpoints")))
    long = "--train-iters 50 --lr-warmup-fraction 0.1 --save-interval 50"
    jobs.append((1, Job("trained", long, folder / "trained_checkpoints")))
    logs = train_in_order(data, folder, jobs)
    return SimpleNamespace(folder=folder, hf=hf, megatron=megatron, logs=logs)


@pytest.mark.parametrize("name", [*LAYOUTS, "odd"])
def test_weights_come_back_from_every_layout(name: str, runs: SimpleNamespace) -> None:
    """Also without the row by which TP2 pads an odd vocabulary."""
    back = runs.folder / f"{name}_back"
    megatron_to_hf(runs.folder / f"{name}_checkpoints", back)
    hf = runs.folder / "odd_hf" if name == "odd" else runs.hf
    exported, expected = read_tensors(back), read_tensors(hf)
    assert exported.keys() == expected.keys()
    different = [n for n in expected if not torch.equal(exported[n], expected[n].float())]
    assert not different


def test_bytes_come_back_from_bf16_training(runs: SimpleNamespace) -> None:
    back = runs.folder / "bf16_back"
    megatron_to_hf(runs.folder / "bf16_checkpoints", back)
    # The card says which checkpoint the training began at.
    names = {path.name for path in runs.hf.iterdir()}
    assert {path.name for path in back.iterdir()} == names | {"README.md"}
    for file in runs.hf.iterdir():
        assert (back / file.name).read_bytes() == file.read_bytes(), file.name


def test_every_layout_starts_from_the_checkpoint(runs: SimpleNamespace) -> None:
    losses = {name: runs.logs[name].scalars("lm loss")[1] for name in LAYOUTS}
    twin = runs.logs["ep2"].scalars("lm loss")[1]
    # Random weights would give other losses in the second digit.
    assert all(abs(loss - twin) < 1e-5 * twin for loss in losses.values()), losses


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "trinity_megatron.cli", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("name", VERIFIED)
def test_verify_in_every_layout(name: str, runs: SimpleNamespace) -> None:
    ranks, layout = LAYOUTS[name]
    flags = layout.replace("--sequence-parallel", "").split()
    where = ["--hf", str(runs.hf), "--megatron", str(runs.megatron), "--seq-length", "37"]
    result = command("verify", *where, "--nproc", str(ranks), *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal within 2e-05" in result.stdout and "100.000%" in result.stdout


def test_verify_sees_a_difference(runs: SimpleNamespace, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(runs.hf, tmp_path / "other")
    file = next(f for f in sorted(other.iterdir()) if "norm.weight" in "".join(_names(f)))
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("norm.weight"))
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    result = command("verify", "--hf", str(other), "--megatron", str(runs.megatron))
    assert result.returncode == 1 and "DIFFERENT" in result.stdout


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    if file.suffix != ".safetensors":
        return []
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


@pytest.fixture(scope="module")
def exported(runs: SimpleNamespace) -> Path:
    """The model of 50 steps, for transformers."""
    target = runs.folder / "trained_hf"
    megatron_to_hf(runs.folder / "trained_checkpoints", target)
    return target


@pytest.fixture(scope="module")
def ours(runs: SimpleNamespace, exported: Path) -> SimpleNamespace:
    """What Megatron's model of the same checkpoint says, in a process of its own."""
    file = runs.folder / "ours.pt"
    arguments = [str(runs.folder / "trained_checkpoints"), str(exported), str(file)]
    script = Path(__file__).with_name("megatron_outputs.py")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(**torch.load(file))


@pytest.fixture(scope="module")
def twin(exported: Path) -> AfmoeForCausalLM:
    """The exported model in transformers."""
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert isinstance(model, AfmoeForCausalLM)
    return model.eval()


def test_validation_loss_equals_transformers(ours: SimpleNamespace, twin: AfmoeForCausalLM) -> None:
    with torch.no_grad():
        logits = twin(ours.tokens[:, :-1]).logits
    labels = ours.tokens[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert ours.loss < 6.2  # it has learned something: log(512) is 6.24
    assert abs(loss.item() - ours.loss) < 1e-4


def test_greedy_continuations_equal_transformers(
    ours: SimpleNamespace, twin: AfmoeForCausalLM
) -> None:
    assert ours.continuations.shape == (5, 64)
    for prompt, continuation in zip(ours.prompts, ours.continuations, strict=True):
        output = twin.generate(
            prompt.unsqueeze(0),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            eos_token_id=-1,
        )
        assert output[0, len(prompt) :].tolist() == continuation.tolist()


def test_generate_command(runs: SimpleNamespace, exported: Path, twin: AfmoeForCausalLM) -> None:
    prompt = "def __init__(self"
    checkpoints = str(runs.folder / "trained_checkpoints")
    result = command(
        "generate", "--load", checkpoints, "--prompt", prompt, "--max-new-tokens", "16"
    )
    assert result.returncode == 0, result.stderr
    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    output = twin.generate(tokens, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
    assert result.stdout == f"{prompt}{text}\n"
