"""A damaged or foreign checkpoint ends a run of two ranks at once, on both, and is named."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.functional_tests.launch import run_script
from trinity_megatron.checkpoint.integrity.checksums import add_checksums, get_checksum, seal
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = """
from trinity_megatron.training import pretrain

if __name__ == "__main__":  # the helper processes of a save import this module again
    pretrain.run()
"""
PARALLEL = (
    "--ckpt-fully-parallel-save --ckpt-fully-parallel-load --use-distributed-optimizer".split()
)


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


def test_it_is_named_and_nobody_waits(data: Path, tmp_path: Path) -> None:
    checkpoints, flags = tmp_path / "run" / "checkpoints", [*PARALLEL, "--save-interval", "2"]
    first = run_script(SCRIPT, data, tmp_path, "--train-iters", "4", *flags)
    assert first.returncode == 0, first.stderr
    latest = checkpoints / "iter_0000004"
    TorchDistReader(latest).check_all()
    storage = FileSystemReader(latest).read_metadata().storage_data.values()
    assert all(get_checksum(info) is not None for info in storage)
    good = shutil.copytree(latest, tmp_path / "good")

    path = latest / "__1_0.distcp"  # what rank 1 reads and rank 0 does not
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    second = run_script(SCRIPT, data, tmp_path, "--train-iters", "6", *flags)
    assert second.returncode != 0 and "exitcode  : 2" in second.stderr, second.stderr
    assert f"error: {path} is damaged" in second.stderr
    assert "the complete checkpoint 2: --ckpt-step 2." in second.stderr
    assert "Traceback" not in second.stderr.split("error: ")[0]

    shutil.rmtree(latest)
    good.rename(latest)
    spoil_object(latest, f"open({str(tmp_path / 'made')!r}, 'w')")
    third = run_script(SCRIPT, data, tmp_path, "--train-iters", "6", *flags)
    assert third.returncode != 0 and "exitcode  : 2" in third.stderr, third.stderr
    assert "an object in it names eval, which no checkpoint of Megatron holds" in third.stderr
    assert not (tmp_path / "made").exists()
