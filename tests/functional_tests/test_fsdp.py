"""Muon on Megatron-FSDP's shards: equal to one process, and saved for every other layout."""

import hashlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.functional_tests.launch import TAKES_ALL, Job, sampled, train_in_order
from tests.functional_tests.test_resume import read_tensors
from tests.functional_tests.test_sharded_muon import EP2, EP4, PP2, SHARDED, elements_sent, of_adam
from trinity_megatron.checkpoint.convert import megatron_to_hf
from trinity_megatron.telemetry.tensorboard_log import RunLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FSDP = "--use-megatron-fsdp"
HSDP = f"{FSDP} --num-distributed-optimizer-instances 2"
# Layout -> ranks, data-parallel size, flags.
ALL_LAYOUTS = {
    "fsdp2": (2, 2, FSDP),
    "fsdp4": (4, 4, FSDP),
    "fsdp8": (8, 8, FSDP),
    "hsdp2x2": (4, 4, HSDP),
    "hsdp4x2": (8, 8, HSDP),
    "hsdp_ep2": (4, 4, f"{HSDP} {EP2}"),
    "hsdp_ep4": (8, 8, f"{HSDP} {EP4}"),
    "ep4": (4, 4, f"{FSDP} {EP4}"),
    "cp2": (2, 1, f"{FSDP} --context-parallel-size 2"),
    "outer": (4, 4, f"{HSDP} --outer-dp-sharding-strategy optim"),
    "outer_ep2": (4, 4, f"{HSDP} {EP2} --outer-dp-sharding-strategy optim"),
    "optim": (2, 2, f"{FSDP} --data-parallel-sharding-strategy optim"),
    "optim_grads": (2, 2, f"{FSDP} --data-parallel-sharding-strategy optim_grads"),
}
LAYOUTS = sampled(ALL_LAYOUTS, "fsdp2", "hsdp_ep2")
COUNTS = {name: (1,) for name in ALL_LAYOUTS}
if TAKES_ALL:
    COUNTS |= {"fsdp2": (1, 4), "hsdp2x2": (1, 2)}
# State of shards is read by the distributed optimizer, also on one rank.
DDP = {
    "alone": (1, 1, SHARDED),
    "ep2": (2, 2, f"{SHARDED} {EP2}"),
    "pp2": (2, 1, f"{SHARDED} {PP2}"),
}
# Written under the first, read under the second.
PAIRS = [("hsdp_ep2", "pp2"), ("pp2", "fsdp2")]
if TAKES_ALL:
    PAIRS += [("fsdp4", "fsdp2"), ("fsdp4", "ep2"), ("pp2", "fsdp4"), ("hsdp2x2", "alone")]
    PAIRS += [("hsdp_ep2", "fsdp4"), ("ep2", "hsdp2x2"), ("fsdp4", "hsdp2x2")]
STOP = f"{FSDP} --exit-interval 5 --save-interval 5"
HALVES = sampled({"half": STOP, "half_async": f"{STOP} --async-save"}, "half_async")
COUNTED = tuple(name for name in ("fsdp4", "hsdp2x2", "hsdp_ep2") if name in LAYOUTS)
TRAFFIC = [
    (name, count)
    for name in ("fsdp2", "hsdp2x2", "hsdp_ep2", "cp2", "optim", "optim_grads", "outer")
    if name in LAYOUTS
    for count in COUNTS[name]
]


def micro_batches(data_parallel: int, count: int) -> str:
    return f"--micro-batch-size {8 // (count * data_parallel)}"


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("fsdp")
    jobs: list[tuple[int, Job]] = []

    def add(name: str, ranks: int, flags: str, **probe: str) -> None:
        jobs.append((ranks, Job(name, flags, checkpoints=folder / f"{name}_saved", probe=probe)))

    add("alone_1", 1, "--micro-batch-size 8")
    add("adam_alone", 1, f"--micro-batch-size 4 {ADAM}")
    add("adam_fsdp2", 2, f"--micro-batch-size 4 {FSDP} {ADAM}")
    add("pp2_1", 2, f"{DDP['pp2'][2]} --micro-batch-size 8")
    if TAKES_ALL:
        add("alone_4", 1, "--micro-batch-size 2")
        add("alone_2", 1, "--micro-batch-size 4")
        add("ep2_1", 2, f"{DDP['ep2'][2]} --micro-batch-size 4")
    for name, flags in HALVES.items():
        add(name, 2, flags)
        resumed = Job(f"{name}_resumed", FSDP, checkpoints=folder / f"{name}_saved")
        jobs.append((2, resumed))
    for name, (ranks, size, flags) in LAYOUTS.items():
        probe = {"collectives": str(folder / name)} if name in COUNTED else {}
        for count in COUNTS[name]:
            if (name, count) in TRAFFIC:
                probe["traffic"] = str(folder / f"{name}_{count}_traffic")
            add(f"{name}_{count}", ranks, f"{flags} {micro_batches(size, count)}", **probe)
            probe = {}
    for saved, loaded in PAIRS:
        ranks, size, flags = {**ALL_LAYOUTS, **DDP}[loaded]
        name = f"{saved}_to_{loaded}"
        again = f"--load {folder}/{saved}_1_saved --save {folder}/{name}_saved --save-interval 7"
        flags = f"{flags} {micro_batches(size, 1)} {again}"
        jobs.append((ranks, Job(name, flags, checkpoints=folder / "none")))
    train_in_order(data, folder, jobs)
    return SimpleNamespace(folder=folder, log=lambda name: RunLog(folder / name))


ADAM = "--optimizer adam --lr 3e-3"


def saved_tensors(runs: SimpleNamespace, name: str) -> dict[str, torch.Tensor]:
    return read_tensors(runs.folder / f"{name}_saved" / "iter_0000010")


def assert_equal_curves(runs: SimpleNamespace, name: str, reference: str) -> None:
    for tag in ("lm loss", "grad-norm"):
        expected, values = runs.log(reference).scalars(tag), runs.log(name).scalars(tag)
        assert list(values) == list(expected) == list(range(1, 11))
        np.testing.assert_allclose(
            list(values.values()), list(expected.values()), rtol=1e-6, err_msg=tag
        )


@pytest.mark.parametrize(("name", "count"), [(n, c) for n in LAYOUTS for c in COUNTS[n]])
def test_equals_one_process(name: str, count: int, runs: SimpleNamespace) -> None:
    assert_equal_curves(runs, f"{name}_{count}", f"alone_{count}")
    alone, found = saved_tensors(runs, f"alone_{count}"), saved_tensors(runs, f"{name}_{count}")
    compared = 0
    for key, expected in alone.items():
        if key.startswith("optimizer") or not expected.is_floating_point():
            continue
        difference = (found[key].double() - expected.double()).norm()
        # AdamW divides gradients that are nearly zero by themselves: rounding decides their sign.
        limit = 1e-5 if of_adam(key) else 1e-6
        assert difference <= limit * expected.double().norm(), key
        compared += not of_adam(key)
    assert compared >= 20


def test_adam_equals_one_process(runs: SimpleNamespace) -> None:
    assert_equal_curves(runs, "adam_fsdp2", "adam_alone")


@pytest.mark.parametrize("name", LAYOUTS)
def test_statistics_of_parts_are_those_of_one_process(name: str, runs: SimpleNamespace) -> None:
    """Gradient norms by group, the experts' load and bias, Muon's diagnostics."""
    alone, found = runs.log("alone_1"), runs.log(f"{name}_1")
    tags = [tag for tag in alone.scalar_tags() if tag.startswith(("gradient", "moe", "muon"))]
    assert len(tags) > 10
    assert set(tags) <= set(found.scalar_tags())
    for tag in tags:
        if tag in ("muon/orthogonality_error", "muon/step_share"):  # of a sample, and of the time
            continue
        expected, values = alone.scalars(tag), found.scalars(tag)
        np.testing.assert_allclose(
            list(values.values()), list(expected.values()), rtol=2e-4, atol=1e-6, err_msg=tag
        )


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_another_layout_loads_all_of_it(saved: str, loaded: str, runs: SimpleNamespace) -> None:
    before, after = saved_tensors(runs, f"{saved}_1"), saved_tensors(runs, f"{saved}_to_{loaded}")
    state = [key for key in before if key.startswith("optimizer.state.")]
    momenta = [key for key in state if "momentum_buffer" in key]
    assert len(momenta) >= 20 and len(state) > 2 * len(momenta)
    for key in before:
        if key in state or key.startswith(("decoder", "embedding", "output_layer")):
            assert torch.equal(before[key], after[key]), key
    assert all(before[key].abs().max() > 0 for key in momenta)
    assert any(key.endswith("expert_bias") for key in before)


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_exports_have_the_same_bytes(
    saved: str, loaded: str, runs: SimpleNamespace, tmp_path: Path
) -> None:
    """The same weights, saved under two layouts, as Hugging Face files."""
    digests = []
    for name in (f"{saved}_1", f"{saved}_to_{loaded}"):
        megatron_to_hf(runs.folder / f"{name}_saved", tmp_path / name, max_shard_size="500KB")
        files = [f for f in (tmp_path / name).iterdir() if f.name != "README.md"]
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    assert digests[0] == digests[1]
    assert sum(name.endswith(".safetensors") for name in digests[0]) > 5


@pytest.mark.parametrize("name", HALVES)
def test_a_resume_is_exact(name: str, runs: SimpleNamespace) -> None:
    expected, found = saved_tensors(runs, "fsdp2_1"), saved_tensors(runs, name)
    for key, value in expected.items():
        if key.startswith(("optimizer.state", "decoder", "embedding", "output_layer")):
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", COUNTED)
def test_bytes_of_a_step(name: str, runs: SimpleNamespace) -> None:
    """Muon sends the pieces of cut matrices, and to replicas the updated ones; nothing else."""
    for rank in range(LAYOUTS[name][0]):
        found = torch.load(runs.folder / f"{name}.{rank}.pt", weights_only=False)
        sums: dict[str, int] = {}
        for call, size, _ in found["calls"]:  # of the last step
            sums[call] = sums.get(call, 0) + size
        assert sums.get("all_to_all_single", 0) == sum(
            elements_sent(placement) * 4 for placement in found["placements"]
        )
        assert not [call for call, _, over_experts in found["calls"] if over_experts]
        assert sums.get("all_gather", 0) == 0 and sums["all_reduce"] < 1024


@pytest.mark.parametrize(("name", "count"), TRAFFIC)
def test_collectives_of_a_step_are_those_of_the_formula(
    name: str, count: int, runs: SimpleNamespace
) -> None:
    """Gathers and reductions of every bucket: how many, over whom, and how many bytes."""
    ranks, _, flags = LAYOUTS[name]
    replicas = 2 if HSDP in flags else 1
    reductions = 1 if name == "optim" else count  # whole gradients are summed up where they are
    over_replicas = "reduce_scatter_tensor" if name == "outer" else "all_reduce"
    for rank in range(ranks):
        found = torch.load(runs.folder / f"{name}_{count}_traffic.{rank}.pt", weights_only=False)
        expected: Counter[tuple[str, int, int]] = Counter()
        for bucket in found["buckets"]:
            weights, gradients, share = (bucket[k] for k in ("weights", "gradients", "ranks"))
            if name == "outer":
                share //= replicas
                once_a_pass = 2 if bucket["is_in_layer"] else 1
                expected["all_gather_into_tensor", weights // share, replicas] += once_a_pass
            gathers = 2 * count if bucket["is_in_layer"] else 1
            expected["all_gather_into_tensor", weights, share] += gathers
            expected["reduce_scatter_tensor", gradients, share] += reductions
            if replicas > 1:
                expected[over_replicas, gradients // share, replicas] += 1
            # The padding is less than a row of each rank.
            assert 1 <= weights / (4 * bucket["elements"]) < 1.01 and gradients == weights
        # What is left is the norm and the like: numbers.
        assert Counter(call for call in found["calls"] if call[1] > 1024) == expected
        assert sum(bucket["elements"] for bucket in found["buckets"]) > 1e6
        layers = {bucket["is_in_layer"] for bucket in found["buckets"]}
        assert layers == ({False} if name.startswith("optim") else {True, False})


@pytest.mark.parametrize("name", COUNTED)
def test_experts_stay_with_their_holders(name: str, runs: SimpleNamespace) -> None:
    """No expert is sent to be orthogonalized; all replicas of a shard share the work."""
    found = torch.load(runs.folder / f"{name}.0.pt", weights_only=False)
    (experts,) = (p for p in found["placements"] if any(s.count > 1 for s in p["stacks"]))
    sizes: dict[int, int] = {}
    for (number, expert, block), owner in zip(experts["matrices"], experts["owners"], strict=True):
        copies = experts["stacks"][number].copies(expert, block)
        assert all(len({piece.rank for piece in copy}) == 1 for copy in copies)
        assert owner in {copy[0].rank for copy in copies}
        sizes[owner] = sizes.get(owner, 0) + 1
    everyone = {s.rank for stack in experts["stacks"] for h in stack.holders for s in h}
    assert set(sizes) == everyone
