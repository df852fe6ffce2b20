"""Muon on the distributed optimizer: equal to one process, in every layout, and saved in all."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.functional_tests.launch import TAKES_ALL, Job, only_in_all, sampled, train_in_order
from tests.functional_tests.test_resume import read_tensors
from trinity_megatron.telemetry.tensorboard_log import RunLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SHARDED = "--use-distributed-optimizer"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
EP2, EP4 = "--expert-model-parallel-size 2", "--expert-model-parallel-size 4"
PP2 = "--pipeline-model-parallel-size 2"
INSTANCES = "--num-distributed-optimizer-instances 2"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 300000"
# Layout -> ranks, data-parallel size, flags.
ALL_LAYOUTS = {
    "dp1": (1, 1, ""),
    "tp2": (2, 1, TP2),
    "ep2": (2, 2, EP2),
    "pp2": (2, 1, PP2),
    "overlap": (2, 2, OVERLAP),
    "ep4": (4, 4, EP4),
    "dp4": (4, 4, ""),
    "tp2_ep2_etp1": (4, 2, f"{TP2} {EP2} --expert-tensor-parallel-size 1"),
    "pp2_ep2": (4, 2, f"{PP2} {EP2}"),
    "instances": (4, 4, f"{INSTANCES} {EP2}"),
    # The first stage has no experts.
    "dense_stage": (2, 1, f"{PP2} --num-dense-layers 2"),
}
LAYOUTS = sampled(ALL_LAYOUTS, "ep2", "dp4", "tp2_ep2_etp1")
# Written under the first, read under the second; every layout changes something else.
PAIRS = [("tp2_ep2_etp1", "dp4")]
if TAKES_ALL:
    PAIRS += [("ep2", "dp4"), ("tp2_ep2_etp1", "ep4"), ("dp4", "pp2"), ("pp2_ep2", "dp1")]
    PAIRS += [("instances", "tp2")]
COUNTED = tuple(
    name for name in ("dp4", "ep4", "tp2_ep2_etp1", "pp2_ep2", "instances") if name in LAYOUTS
)


# Micro-batches of a step; a batch of 8 sequences has no 4 of them on 4 ranks.
COUNTS = {name: (1,) for name in ALL_LAYOUTS}
if TAKES_ALL:
    COUNTS |= {"ep2": (1, 4), "tp2_ep2_etp1": (1, 4)}


def micro_batches(name: str, count: int) -> str:
    return f"--micro-batch-size {8 // (count * ALL_LAYOUTS[name][1])}"


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("sharded")
    jobs: list[tuple[int, Job]] = []

    def add(name: str, ranks: int, flags: str, **probe: Any) -> None:
        jobs.append((ranks, Job(name, flags, checkpoints=folder / f"{name}_saved", probe=probe)))

    def add_load(name: str, ranks: int, flags: str, **probe: Any) -> None:
        jobs.append((ranks, Job(name, flags, checkpoints=folder / "none", probe=probe)))

    if TAKES_ALL:
        add("alone_4", 1, "--micro-batch-size 2")
    add("alone_1", 1, "--micro-batch-size 8")
    if "dense_stage" in LAYOUTS:
        add("alone_dense", 1, "--micro-batch-size 8 --num-dense-layers 2")
    bf16 = f"{SHARDED} {EP2} --muon-momentum-dtype bf16"
    for name, flags in (
        ("half", f"{SHARDED} {EP2} --exit-interval 5 --save-interval 5"),
        ("bf16", bf16),
    ):
        add(name, 2, flags)
    jobs.append((2, Job("resumed", f"{SHARDED} {EP2}", checkpoints=folder / "half_saved")))
    for name, (ranks, _, flags) in LAYOUTS.items():
        probe = {"collectives": str(folder / name)} if name in COUNTED else {}
        for count in COUNTS[name]:
            add(
                f"{name}_{count}",
                ranks,
                f"{SHARDED} {flags} {micro_batches(name, count)}",
                **probe,
            )
            probe = {}
    # What was loaded is saved again at once: no step is left to train, and none was a save.
    for saved, loaded in PAIRS:
        ranks, _, flags = ALL_LAYOUTS[loaded]
        name = f"{saved}_to_{loaded}"
        again = f"--load {folder}/{saved}_1_saved --save {folder}/{name}_saved --save-interval 7"
        add_load(name, ranks, f"{SHARDED} {flags} {micro_batches(loaded, 1)} {again}")
    shared_loads = (("load_alone", ""), ("load_shared", "--ckpt-fully-parallel-load"))
    for name, parallel in shared_loads if TAKES_ALL else ():
        again = f"--load {folder}/ep2_1_saved --save {folder}/{name}_saved --train-iters 11"
        flags = f"{SHARDED} {ALL_LAYOUTS['instances'][2]} {micro_batches('instances', 1)}"
        add_load(name, 4, f"{flags} {again} {parallel}")
    megatron = {"gather_state": True}
    ep2, tp2 = (f"{SHARDED} {ALL_LAYOUTS[n][2]} {micro_batches(n, 1)}" for n in ("ep2", "tp2"))
    gathered = [("boxes_to_gathered", "ep2_1_saved", megatron)]
    gathered += [("gathered_to_boxes", "gathered_saved", {})]
    if TAKES_ALL:
        add("gathered", 2, ep2, **megatron)
    for name, source, probe in gathered if TAKES_ALL else ():
        again = f"--load {folder}/{source} --save {folder}/{name}_saved --save-interval 7"
        add_load(name, 2, f"{tp2} {again}", **probe)
    train_in_order(data, folder, jobs)
    return SimpleNamespace(folder=folder, log=lambda name: RunLog(folder / name))


def saved_tensors(runs: SimpleNamespace, name: str) -> dict[str, torch.Tensor]:
    return read_tensors(runs.folder / f"{name}_saved" / "iter_0000010")


def of_adam(name: str) -> bool:
    return "layernorm" in name or "embedding" in name or "output_layer" in name


@pytest.mark.parametrize(("name", "count"), [(n, c) for n in LAYOUTS for c in COUNTS[n]])
def test_equals_one_process(name: str, count: int, runs: SimpleNamespace) -> None:
    one_process = "alone_dense" if name == "dense_stage" else f"alone_{count}"
    serial, sharded = runs.log(one_process), runs.log(f"{name}_{count}")
    for tag in ("lm loss", "grad-norm"):
        expected, values = serial.scalars(tag), sharded.scalars(tag)
        assert list(values) == list(expected) == list(range(1, 11))
        np.testing.assert_allclose(
            list(values.values()), list(expected.values()), rtol=1e-6, err_msg=tag
        )
    alone, found = saved_tensors(runs, one_process), saved_tensors(runs, f"{name}_{count}")
    compared = 0
    for key, expected_value in alone.items():
        if key.startswith("optimizer") or not expected_value.is_floating_point():
            continue
        difference = (found[key].double() - expected_value.double()).norm()
        # AdamW divides gradients that are nearly zero by themselves: rounding decides their sign.
        limit = 1e-5 if of_adam(key) else 1e-6
        assert difference <= limit * expected_value.double().norm(), key
        compared += not of_adam(key)
    assert compared >= 20


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


@only_in_all
def test_ranks_share_what_they_have_read(runs: SimpleNamespace) -> None:
    """Experts and optimizer instances are on two ranks each; one of them reads a tensor."""
    for tag in ("lm loss", "grad-norm"):
        alone, shared = (runs.log(name).scalars(tag) for name in ("load_alone", "load_shared"))
        assert shared == alone and list(alone) == [11]


@only_in_all
def test_megatrons_own_checkpoint_is_the_same(runs: SimpleNamespace) -> None:
    """Names, shapes, dtypes and values of what Megatron would gather; it reads ours, we its."""
    ours, gathered = saved_tensors(runs, "ep2_1"), saved_tensors(runs, "gathered")
    assert set(ours) == set(gathered)
    read_by_megatron = saved_tensors(runs, "boxes_to_gathered")
    read_by_us = saved_tensors(runs, "gathered_to_boxes")
    for key, value in gathered.items():
        if key.startswith(("optimizer.state.", "decoder", "embedding", "output_layer")):
            assert value.dtype == ours[key].dtype
            for found in (ours, read_by_megatron, read_by_us):
                assert torch.equal(found[key], value), key


@pytest.mark.parametrize(
    ("name", "is_cut"), [("dp4_1", True), pytest.param("gathered", False, marks=only_in_all)]
)
def test_every_rank_saves_its_own_shard(name: str, is_cut: bool, runs: SimpleNamespace) -> None:
    metadata = FileSystemReader(runs.folder / f"{name}_saved" / "iter_0000010").read_metadata()
    writers: dict[str, set[int]] = {}
    sizes: dict[int, int] = {}
    for index, place in metadata.storage_data.items():
        if not index.fqn.startswith("optimizer.state."):
            continue
        chunks = metadata.state_dict_metadata[index.fqn].chunks
        (chunk,) = (one for one in chunks if one.offsets == index.offset)
        rank = int(place.relative_path.split("_")[2])  # __RANK_FILE.distcp
        writers.setdefault(index.fqn, set()).add(rank)
        sizes[rank] = sizes.get(rank, 0) + chunk.sizes.numel()
    # One matrix is written by several ranks only if nobody has gathered it.
    single = ("linear_qkv.weight", "linear_proj.weight", "output_layer.weight")
    several = [key for key, by in writers.items() if key.endswith(single) and len(by) > 1]
    assert bool(several) == is_cut
    assert max(sizes.values()) <= 1.02 * min(sizes.values())


def test_a_resume_is_exact(runs: SimpleNamespace) -> None:
    expected, found = saved_tensors(runs, "ep2_1"), saved_tensors(runs, "half")
    for key, value in expected.items():
        if key.startswith(("optimizer.state", "decoder", "embedding", "output_layer")):
            assert torch.equal(found[key], value), key


def test_bf16_momentum_is_bf16(runs: SimpleNamespace) -> None:
    kinds = {
        name: {
            torch.equal(value, value.bfloat16().to(value.dtype))
            for key, value in saved_tensors(runs, name).items()
            if "momentum_buffer" in key
        }
        for name in ("bf16", "ep2_1")
    }
    assert kinds == {"bf16": {True}, "ep2_1": {False}}


@pytest.mark.parametrize("name", COUNTED)
def test_bytes_of_a_step(name: str, runs: SimpleNamespace) -> None:
    """Gradients in, weights out, and the elements of matrices that are not with their owner."""
    for rank in range(LAYOUTS[name][0]):
        found = torch.load(runs.folder / f"{name}.{rank}.pt", weights_only=False)
        sums: dict[str, int] = {}
        for call, size, _ in found["calls"]:  # of the last step
            sums[call] = sums.get(call, 0) + size
        # The whole buffer goes into the reduction, and the whole buffer comes out of the gather.
        assert sums["dist_reduce_scatter_func"] == sum(grads for grads, _ in found["buffers"])
        assert sums["dist_all_gather_func"] == sum(weights for _, weights in found["buffers"])
        assert sums.get("all_to_all_single", 0) == sum(
            elements_sent(placement) * 4 for placement in found["placements"]
        )
        assert not [call for call, _, over_experts in found["calls"] if over_experts]
        # What is left is the norm and the like: numbers.
        assert sums.get("all_gather", 0) == 0 and sums["all_reduce"] < 1024


def elements_sent(placement: dict[str, Any]) -> int:
    """Element by element: what this rank puts into the all-to-alls, its own part included."""
    rank, sent = placement["rank"], 0
    for (number, expert, block), owner in zip(
        placement["matrices"], placement["owners"], strict=True
    ):
        stack = placement["stacks"][number]
        holders = []
        for shards in stack.holders:
            holder = np.full(stack.numel, -1)
            for shard in shards:
                assert (holder[shard.start : shard.stop] == -1).all()
                holder[shard.start : shard.stop] = shard.rank
            assert (holder >= 0).all()
            rows = holder.reshape(stack.count, -1, sum(stack.sizes), stack.columns)[expert]
            first = sum(stack.sizes[:block])
            holders.append(rows[:, first : first + stack.sizes[block]])
        target = np.concatenate(holders, axis=None)
        # Of several copies the owner's own is taken, else that of its replica.
        own = [index for index, holder in enumerate(holders) if (holder == owner).any()]
        copy = own[0] if own else owner * len(holders) // placement["ranks"]
        source = target if stack.shard_dim is not None else holders[copy].ravel()
        if (target == owner).all():
            continue
        sent += int((source == rank).sum())
        sent += int(target.size) if owner == rank else 0
    return sent
