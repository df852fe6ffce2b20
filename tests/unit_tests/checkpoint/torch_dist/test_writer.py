"""``torch_dist`` checkpoints written without a model."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import load_common_state_dict

from tests.unit_tests.checkpoint.torch_dist.torch_dist_cases import (
    COMMON,
    EXTRA_STATE,
    join,
    make_parts,
    make_tensors,
    slice_of,
    write,
)
from trinity_megatron.checkpoint.torch_dist.parts import Part
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.checkpoint.torch_dist.writer import TorchDistWriter
from trinity_megatron.checkpoint.transforms import cut


def test_every_part_is_asked_for_once(tmp_path: Path) -> None:
    tensors = make_tensors()
    parts = make_parts(tensors)
    asked = write(tmp_path / "iter", tensors, [parts[::2], parts[1::2]])
    assert sorted(asked, key=str) == sorted(parts, key=str)


def test_memory_of_a_part_can_be_used_for_the_next(tmp_path: Path) -> None:
    values = torch.arange(40.0).reshape(10, 4)
    parts = [Part("w", *box) for box in cut((10, 4), 8)]
    memory = torch.empty(2, 4)

    def read(part: Part) -> torch.Tensor:
        return memory.copy_(slice_of(part, {"w": values}))

    shapes = {"w": (values.dtype, (10, 4))}
    writer = TorchDistWriter(tmp_path, shapes, [parts], common=COMMON, extra_state=[])
    writer.finish([writer.write(0, read)])
    assert torch.equal(join(TorchDistReader(tmp_path), "w"), values)


def test_torch_reads_what_is_written(checkpoint: Path) -> None:
    expected = make_tensors()
    found: dict[str, Any] = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    dcp.load(found, checkpoint_id=checkpoint, no_dist=True)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_megatron_reads_the_common_state(checkpoint: Path) -> None:
    assert load_common_state_dict(str(checkpoint)) == COMMON


def test_extra_state_is_there_for_megatron(checkpoint: Path) -> None:
    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    objects = {f"{key}/shard_0_1" for key in EXTRA_STATE} | {"common_state/shard_0_1"}
    assert metadata.state_dict_metadata.keys() == {*make_tensors(), *objects}


def test_one_file_is_written_again_alone(checkpoint: Path, tmp_path: Path) -> None:
    tensors = make_tensors()
    shapes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    parts = make_parts(tensors)
    files = [parts[0::2], parts[1::2]]
    folder = tmp_path / "again"
    folder.mkdir()
    options: dict[str, Any] = {"common": COMMON, "extra_state": EXTRA_STATE}

    def nothing(part: Part) -> torch.Tensor:
        return torch.zeros(part.shape, dtype=tensors[part.key].dtype)

    first = TorchDistWriter(folder, shapes, files, **options)
    kept = first.write(0, lambda part: slice_of(part, tensors))
    first.write(1, nothing)  # and then the lights go out
    second = TorchDistWriter(folder, shapes, files, **options)
    second.finish([kept, second.write(1, lambda part: slice_of(part, tensors))])
    reader = TorchDistReader(folder)
    assert all(torch.equal(join(reader, key), tensors[key]) for key in reader.model_tensors())
