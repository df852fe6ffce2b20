"""A run that was stopped and continued equals one that was not, bit for bit."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.functional_tests.launch import ADAM, TAKES_ALL, Job, only_in_all, train
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, TOKENS_TAG, RunLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# The schedule depends on --train-iters: the first half stops early instead.
WHOLE = "--train-iters 20"
HALF = f"{WHOLE} --exit-interval 10"
EP2 = "--expert-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
# In bf16; the batch grows after 13 steps, at 13 x 4 samples of 64 tokens, after the resume.
JUMP = f"--bf16 --step-batch-size-schedule 0:4,{13 * 4 * 64}:8"
# torch's AdamW, sharded by Megatron's distributed optimizer.
SHARDED_ADAM = f"{' '.join(ADAM)} --use-distributed-optimizer --num-layers 2"


def adam(job: Job) -> list[Job]:
    return [job] * TAKES_ALL


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("resume")
    names = ("whole", "half", "ep2", "longer", "adam_whole", "adam_half", "jump_whole", "jump_half")
    ckpt = {name: folder / f"{name}_checkpoints" for name in names}
    first = [
        (
            1,
            [
                Job("whole", WHOLE, ckpt["whole"]),
                Job("half", HALF, ckpt["half"]),
                *adam(Job("adam_whole", f"{WHOLE} {SHARDED_ADAM}", ckpt["adam_whole"])),
                *adam(Job("adam_half", f"{HALF} {SHARDED_ADAM}", ckpt["adam_half"])),
                Job("jump_whole", f"{WHOLE} {JUMP}", ckpt["jump_whole"]),
                Job("jump_half", f"{HALF} {JUMP}", ckpt["jump_half"]),
                Job("again", f"{WHOLE} --exit-interval 5"),
            ],
        ),
        (2, [Job("ep2_half", f"{HALF} {EP2}", ckpt["ep2"])]),
    ]
    logs = train(data, folder, first)
    shutil.copytree(ckpt["half"], ckpt["longer"])
    # The ranks above are gone.  Each of these only loads (and "half" saves again at its end).
    load = f"--load {ckpt['ep2']}"
    second = [
        (
            1,
            [
                Job("half", WHOLE, ckpt["half"]),
                *adam(Job("adam_half", f"{WHOLE} {SHARDED_ADAM}", ckpt["adam_half"])),
                Job("jump_half", f"{WHOLE} {JUMP}", ckpt["jump_half"]),
                Job("longer", "--train-iters 13 --save-interval 100", ckpt["longer"]),
                Job("ep2_on_one", f"{WHOLE} {load}"),
            ],
        ),
        (
            2,
            [
                Job("ep2_on_ep2", f"{WHOLE} {EP2} {load}"),
                Job("ep2_on_tp2", f"{WHOLE} {TP2} {load}"),
            ],
        ),
    ]
    logs.update(train(data, folder, second))
    return SimpleNamespace(logs=logs, checkpoints=ckpt)


@pytest.mark.parametrize("kind", ["", pytest.param("adam_", marks=only_in_all), "jump_"])
def test_losses_are_equal_bit_for_bit(kind: str, runs: SimpleNamespace) -> None:
    whole, resumed = runs.logs[f"{kind}whole"], runs.logs[f"{kind}half"]
    for tag in ("lm loss", "grad-norm", "learning-rate"):
        assert list(whole.scalars(tag)) == list(range(1, 21))
        assert resumed.scalars(tag) == whole.scalars(tag), tag
    for tag in (TOKENS_TAG, BIAS_TAG):
        a, b = whole.tensors(tag), resumed.tensors(tag)
        assert list(a) == list(b) and all(np.array_equal(a[step], b[step]) for step in a)


def test_a_run_leaves_nothing_to_the_next_one_of_its_process(runs: SimpleNamespace) -> None:
    """Runs with another precision, another batch and other ends lie between the two."""
    first, again = runs.logs["whole"], runs.logs["again"]
    for tag in ("lm loss", "grad-norm", "learning-rate", "moe/mean_max_violation"):
        values = again.scalars(tag)
        assert list(values) == [1, 2, 3, 4, 5]
        assert values.items() <= first.scalars(tag).items(), tag


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a distributed checkpoint, whole."""
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    names = {name for name, item in metadata.items() if isinstance(item, TensorStorageMetadata)}
    file = checkpoint.with_suffix(".pt")
    dcp_to_torch_save(checkpoint, file)
    content = torch.load(file, weights_only=False)
    os.remove(file)
    tensors: dict[str, torch.Tensor] = {}

    def collect(value: object, name: str) -> None:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                collect(item, f"{name}.{key}" if name else str(key))

    collect(content, "")
    assert names <= set(tensors)
    return tensors


def test_checkpoints_are_equal_bit_for_bit(runs: SimpleNamespace) -> None:
    whole = read_tensors(runs.checkpoints["whole"] / "iter_0000020")
    resumed = read_tensors(runs.checkpoints["half"] / "iter_0000020")
    assert set(whole) == set(resumed)
    different = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert not different
    for part in (
        "self_attention.linear_qkv.weight",
        "mlp.experts.experts.linear_fc1.weight",
        "mlp.router.expert_bias",
        "mlp.router.expert_bias_momentum",
        "optimizer.state.momentum_buffer",
        "optimizer.state.exp_avg_sq",
    ):
        found = [tensor for name, tensor in whole.items() if part in name]
        assert found and all(tensor.abs().max() > 0 for tensor in found), (part, sorted(whole))


def test_a_growing_batch_keeps_the_learning_rate_schedule(runs: SimpleNamespace) -> None:
    """It is a function of the consumed samples, whatever the batch was that consumed them."""
    for name in ("jump_whole", "jump_half"):
        log = runs.logs[name]
        sizes = log.scalars("batch-size")
        assert list(sizes.values()) == [4] * 13 + [8] * 7
        consumed = np.cumsum(list(sizes.values()))
        total = consumed[-1]
        assert total == 108
        warmup, decay = total / 2, round(0.4 * total)
        rates = np.array(list(log.scalars("learning-rate").values()))
        falling = 1e-3 + (1e-2 - 1e-3) * (total - consumed) / decay
        expected = np.minimum(1e-2 * np.minimum(consumed / warmup, 1), np.minimum(falling, 1e-2))
        np.testing.assert_allclose(rates, expected, rtol=1e-6)


@only_in_all
def test_a_sharded_adam_is_saved_and_loaded_whole(runs: SimpleNamespace) -> None:
    whole = read_tensors(runs.checkpoints["adam_whole"] / "iter_0000020")
    resumed = read_tensors(runs.checkpoints["adam_half"] / "iter_0000020")
    assert set(whole) == set(resumed)
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert any("exp_avg_sq" in name for name in whole)


def test_bf16_training_keeps_the_balance_in_fp32(runs: SimpleNamespace) -> None:
    # What was saved in the middle and loaded, and what was never saved before the end.
    resumed = read_tensors(runs.checkpoints["jump_half"] / "iter_0000020")
    whole = read_tensors(runs.checkpoints["jump_whole"] / "iter_0000020")
    names = [name for name in whole if "mlp.router.expert_bias" in name]
    assert len(names) == 6  # bias and momentum of three layers
    for name in names:
        assert whole[name].dtype == resumed[name].dtype == torch.float32
        assert torch.equal(whole[name], resumed[name])
        # bf16 could not hold them.
        assert not torch.equal(whole[name], whole[name].bfloat16().float())
    weights = [tensor for name, tensor in whole.items() if name.endswith("router.weight")]
    assert {tensor.dtype for tensor in weights} >= {torch.bfloat16}


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_a_checkpoint_continues_in_another_layout(layout: str, runs: SimpleNamespace) -> None:
    def losses(log: RunLog) -> list[float]:
        values = log.scalars("lm loss")
        assert list(values) == list(range(11, 21))
        return list(values.values())

    # fp32 sums in another order, as in test_parallel_parity.
    np.testing.assert_allclose(
        losses(runs.logs[f"ep2_on_{layout}"]), losses(runs.logs["ep2_on_ep2"]), rtol=2e-5
    )


def test_the_number_of_steps_may_change(runs: SimpleNamespace) -> None:
    losses, whole = runs.logs["longer"].scalars("lm loss"), runs.logs["whole"].scalars("lm loss")
    assert list(losses) == [11, 12, 13]
    # The step's loss comes before its update: not yet touched by the other schedule.
    assert losses[11] == whole[11]
