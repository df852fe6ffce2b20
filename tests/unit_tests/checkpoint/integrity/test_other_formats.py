"""No format of Megatron's checkpoints runs a program when a training loads it."""

import os
import pickle
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.training import checkpointing
from torch.distributed.checkpoint.metadata import Metadata

from tests.unit_tests.parallel_state import one_rank_world
from trinity_megatron.checkpoint.integrity.guarded_load import guarded_loads
from trinity_megatron.checkpoint.integrity.safe_pickle import BadCheckpoint


class Call:
    """Pickled as a call of ``os.mkdir``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank_world(tmp_path_factory.mktemp("world") / "store"):
        yield


def arguments(folder: Path, ckpt_format: str, **more: Any) -> Namespace:
    values = {
        "load": str(folder),
        "ckpt_format": ckpt_format,
        "auto_detect_ckpt_format": False,
        "ckpt_step": None,
        "non_persistent_ckpt_type": None,
        "non_persistent_global_ckpt_dir": None,
        "exit_on_missing_checkpoint": True,
        "dist_ckpt_strictness": "assume_ok_unexpected",
        "ckpt_assume_constant_structure": False,
        "stream_ckpt_dequant": False,
        "ckpt_fully_parallel_load": False,
        "ckpt_load_validate_sharding_integrity": True,
        "verify_integrity": False,
    }
    return Namespace(**{**values, **more})


def load(folder: Path, args: Namespace, *, rank0: bool = False) -> Any:
    with guarded_loads():
        return checkpointing._load_base_checkpoint(
            str(folder), args, rank0=rank0, sharded_state_dict={}, checkpointing_context={}
        )


def write_legacy(folder: Path, content: Any) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    inner = folder / "iter_0000003" / "mp_rank_00"
    inner.mkdir(parents=True)
    torch.save(content, inner / "model_optim_rng.pt")


@pytest.mark.parametrize("rank0", [True, False])
def test_legacy(world: None, tmp_path: Path, rank0: bool) -> None:
    write_legacy(tmp_path, {"args": Namespace(hidden_size=8), "iteration": 3})
    found = load(tmp_path, arguments(tmp_path, "torch"), rank0=rank0)[0]
    assert found["args"].hidden_size == 8


@pytest.mark.parametrize("rank0", [True, False])
def test_hostile_legacy(world: None, tmp_path: Path, rank0: bool) -> None:
    made = tmp_path / "made"
    write_legacy(tmp_path, {"args": Call(made), "iteration": 3})
    with pytest.raises(BadCheckpoint, match=r"model_optim_rng\.pt names posix\.mkdir"):
        load(tmp_path, arguments(tmp_path, "torch"), rank0=rank0)
    assert not made.exists()


def write_metadata(folder: Path, name: str, made: Path) -> None:
    inner = folder / name
    inner.mkdir(parents=True)
    metadata = Metadata({}, planner_data=Call(made), storage_data={})
    (inner / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "fsdp_dtensor", "torch_dcp"])
def test_hostile_metadata(world: None, tmp_path: Path, ckpt_format: str) -> None:
    made = tmp_path / "made"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    write_metadata(tmp_path, "iter_0000003", made)
    if ckpt_format == "torch_dist":
        (tmp_path / "iter_0000003" / "metadata.json").write_text(
            '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
        )
    with pytest.raises(BadCheckpoint, match=r"\.metadata names posix\.mkdir"):
        load(tmp_path, arguments(tmp_path, ckpt_format))
    assert not made.exists()


def test_hostile_non_persistent(world: None, tmp_path: Path) -> None:
    made, folder = tmp_path / "made", tmp_path / "non_persistent"
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    write_metadata(folder, "iter_0000005", made)
    (folder / "iter_0000005" / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )
    args = arguments(
        tmp_path,
        "torch_dist",
        non_persistent_ckpt_type="global",
        non_persistent_global_ckpt_dir=str(folder),
    )
    with pytest.raises(BadCheckpoint, match=r"\.metadata names posix\.mkdir"):
        load(tmp_path, args)
    assert not made.exists()


def test_a_hostile_position_of_the_data(tmp_path: Path) -> None:
    from trinity_megatron.errors import UserError
    from trinity_megatron.training.datasets.buffer_state import read_head

    made = tmp_path / "made"
    (tmp_path / "mp_rank_00").mkdir()
    path = tmp_path / "mp_rank_00" / "train_dataloader_dprank000.pt"
    torch.save({"dataloader_state_dict": Call(made)}, path)
    with pytest.raises(UserError, match=r"dprank000\.pt is damaged"):
        read_head(tmp_path, Namespace(allow_data_change=False, consumed_train_samples=0))
    assert not made.exists()
