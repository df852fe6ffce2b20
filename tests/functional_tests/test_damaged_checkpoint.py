"""A damaged or foreign checkpoint ends a run of two ranks at once, on both, and is named."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.functional_tests.launch import only_in_all, run_script
from trinity_megatron.checkpoint.integrity.checksums import add_checksums, get_checksum, seal
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = """
from trinity_megatron.training import pretrain

if __name__ == "__main__":  # the helper processes of a save import this module again
    pretrain.run()
"""
FLAGS = (
    "--ckpt-fully-parallel-save --ckpt-fully-parallel-load --use-distributed-optimizer "
    "--save-interval 2"
).split()


class Call:
    """Pickled as a call of `eval`."""

    def __init__(self, program: str) -> None:
        self.program = program

    def __reduce__(self) -> tuple[object, ...]:
        return eval, (self.program,)


def spoil_object(folder: Path, program: str) -> None:
    """Have the random state of a checkpoint run a program, with right checksums."""
    metadata = FileSystemReader(folder).read_metadata()
    info = next(info for i, info in metadata.storage_data.items() if "rng_state" in i.fqn)
    path = folder / info.relative_path
    info.offset = path.stat().st_size
    with path.open("ab") as file:
        torch.save([Call(program)], file)
    info.length = path.stat().st_size - info.offset
    add_checksums(folder, [info])
    (folder / ".metadata").write_bytes(seal(pickle.dumps(metadata)))


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("damaged")
    first = run_script(SCRIPT, data, folder, "--train-iters", "4", *FLAGS)
    assert first.returncode == 0, first.stderr
    return folder


def start_again(checkpoint: Path, data: Path, folder: Path, spoil: Callable[[Path], None]) -> str:
    """What a run from a spoilt copy says when it ends."""
    shutil.copytree(checkpoint / "run", folder / "run")
    spoil(folder / "run" / "checkpoints" / "iter_0000004")
    result = run_script(SCRIPT, data, folder, "--train-iters", "6", *FLAGS)
    assert result.returncode != 0 and "exitcode  : 2" in result.stderr, result.stderr
    return result.stderr


def test_every_shard_has_a_checksum(checkpoint: Path) -> None:
    latest = checkpoint / "run" / "checkpoints" / "iter_0000004"
    TorchDistReader(latest).check_all()
    storage = FileSystemReader(latest).read_metadata().storage_data.values()
    assert all(get_checksum(info) is not None for info in storage)


def test_it_is_named_and_nobody_waits(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    name = "__1_0.distcp"  # what rank 1 reads and rank 0 does not

    def change_one_bit(latest: Path) -> None:
        content = bytearray((latest / name).read_bytes())
        content[len(content) // 2] ^= 0x10
        (latest / name).write_bytes(content)

    output = start_again(checkpoint, data, tmp_path, change_one_bit)
    path = tmp_path / "run" / "checkpoints" / "iter_0000004" / name
    assert f"error: {path} is damaged" in output
    assert "the complete checkpoint 2: --ckpt-step 2." in output
    assert "Traceback" not in output.split("error: ")[0]


@only_in_all  # tests/unit_tests/checkpoint/integrity has it without ranks
def test_an_object_that_runs_code(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    program = f"open({str(tmp_path / 'made')!r}, 'w')"
    output = start_again(checkpoint, data, tmp_path, lambda latest: spoil_object(latest, program))
    assert "an object in it names eval, which no checkpoint of Megatron holds" in output
    assert not (tmp_path / "made").exists()
