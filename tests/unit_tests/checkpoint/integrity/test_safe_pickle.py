"""What a pickle names is called only if it belongs there."""

import argparse
import copyreg
import functools
import io
import os
import pickle
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from trinity_megatron.checkpoint.integrity.safe_pickle import (
    BadCheckpoint,
    is_plain_name,
    load_metadata,
    safe_torch_load,
)


class Call:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def by_stack(module: str, name: str, argument: str) -> bytes:
    """STACK_GLOBAL and REDUCE: protocol 4, where names may have dots."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


ATTACKS: dict[str, Callable[[str], bytes]] = {
    "plain call": lambda path: pickle.dumps(Call(os.mkdir, path)),
    "inside of metadata": lambda path: pickle.dumps(
        Metadata({}, planner_data=[{"x": Call(os.mkdir, path)}], storage_data={})
    ),
    "protocol 0": lambda path: pickle.dumps(Call(os.mkdir, path), protocol=0),
    "protocol 2": lambda path: pickle.dumps(Call(os.mkdir, path), protocol=2),
    "a dot through torch": lambda path: by_stack("torch", "os.mkdir", path),
    "a dot through an allowed module": lambda path: by_stack(
        "torch.distributed.checkpoint.filesystem", "os.mkdir", path
    ),
    "a dot through an allowed class": lambda path: by_stack(
        "torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__", path
    ),
    "getattr": lambda path: pickle.dumps(Call(getattr, Call(__import__, "os"), "mkdir")),
    "partial": lambda path: pickle.dumps(functools.partial(os.mkdir, path)),
    "a pickle in a pickle": lambda path: pickle.dumps(
        Call(pickle.loads, pickle.dumps(Call(os.mkdir, path)))
    ),
    "a storage": lambda path: pickle.dumps(
        Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.mkdir, path)))
    ),
    "torch.load": lambda path: pickle.dumps(Call(torch.load, path)),
    "numpy": lambda path: pickle.dumps(Call(np.load, path)),
    "INST": lambda path: b"(S'" + path.encode() + b"'\niposix\nmkdir\n.",
    "an object by number": lambda path: b"\x80\x02\x82\x01U" + text(path)[1:] + b"\x85R.",
    "a persistent id": lambda path: b"\x80\x04" + text(path) + b"Q.",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_metadata_does_not_run_a_program(tmp_path: Path, name: str) -> None:
    content = ATTACKS[name](str(tmp_path / "made"))
    copyreg.add_extension("posix", "mkdir", 1)
    try:
        with pytest.raises(BadCheckpoint, match=r"\.metadata (names|is damaged)") as error:
            load_metadata(content, "folder/.metadata")
    finally:
        copyreg.remove_extension("posix", "mkdir", 1)
    assert not list(tmp_path.iterdir())
    assert "Remedy" in str(error.value)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_object_does_not_run_a_program(tmp_path: Path, name: str) -> None:
    content = ATTACKS[name](str(tmp_path / "made"))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    load = safe_torch_load(torch.load)
    for weights_only in (False, True):
        stream.seek(0)
        with pytest.raises(BadCheckpoint):
            load(stream, weights_only=weights_only)
    assert not list(tmp_path.iterdir())


def test_the_refused_name_is_said() -> None:
    metadata = pickle.dumps(Metadata({}, planner_data=Call(os.system, "true"), storage_data={}))
    with pytest.raises(BadCheckpoint, match=r"run/\.metadata names posix\.system, which no"):
        load_metadata(metadata, "run/.metadata")
    stream = io.BytesIO()
    torch.save(Call(os.system, "true"), stream)
    stream.seek(0)
    with pytest.raises(BadCheckpoint, match="names posix.system|names os.system"):
        safe_torch_load(torch.load)(stream)


def test_what_megatron_saves_is_loaded() -> None:
    expected = {
        "args": argparse.Namespace(
            attention_backend=AttnBackend.auto, exit_signal=signal.SIGTERM, dtype=torch.bfloat16
        ),
        "rng": np.random.RandomState(0).get_state(),
        "lr": np.float64(0.25),
        "counts": np.arange(3, dtype=np.int64),
    }
    stream = io.BytesIO()
    torch.save(expected, stream)
    stream.seek(0)
    found = safe_torch_load(torch.load)(stream, weights_only=False)
    assert str(found) == str(expected)


OUTSIDE = ("../x.distcp", "/etc/passwd", "a/b.distcp", "..", ".", "", "a\\b", "a\0b", 3)


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out(name: Any) -> None:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    assert not is_plain_name(name)
    metadata = Metadata({}, storage_data={MetadataIndex("w"): _StorageInfo(name, 0, 8)})
    with pytest.raises(BadCheckpoint, match="outside its folder"):
        load_metadata(pickle.dumps(metadata), "run/.metadata")


@pytest.mark.parametrize("content", [b"", b"\x80", b"nothing", pickle.dumps([1]), b"\xff" * 90])
def test_damaged_metadata(content: bytes) -> None:
    with pytest.raises(BadCheckpoint, match="run/.metadata is damaged"):
        load_metadata(content, "run/.metadata")


def test_a_file_by_name_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "common.pt"
    torch.save({"numbers": torch.arange(1000)}, path)
    load = safe_torch_load(torch.load)
    assert load(path)["numbers"][-1] == 999
    content = path.read_bytes()
    at = content.index(struct.pack("<q", 500))
    path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    with pytest.raises(BadCheckpoint, match="common.pt is damaged"):
        load(path)
    assert safe_torch_load(torch.load, verify_checksums=False)(path)["numbers"][500] != 500
    path.write_bytes(content[:-1])
    with pytest.raises(BadCheckpoint, match="common.pt is damaged"):
        load(path)
