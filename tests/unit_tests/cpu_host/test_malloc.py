"""Freed memory is kept for the next tensors, and the user's own settings stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trinity_megatron.cpu_host.malloc import keep_freed_memory

ROOT = Path(__file__).resolve().parents[3]
_GLIBC = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})
needs_glibc = pytest.mark.skipif(not _GLIBC, reason="only glibc's malloc is set")

# What stays of 128 MiB in blocks of 2 MiB, and of one block of 128 MiB, when they are freed: MiB.
_SCRIPT = """
import resource, sys, torch
from trinity_megatron.cpu_host.malloc import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20

kept = sys.argv[1] == "keep" and keep_freed_memory()
found = []
for count in (64, 1):
    before = resident()
    blocks = [torch.ones(128 // count * 2**18) for _ in range(count)]
    while blocks:
        blocks.pop()
    found.append(resident() - before)
print(kept, *found)
"""


def _stays(mode: str, **environment: str) -> tuple[str, int, int]:
    clean = {k: v for k, v in os.environ.items() if "MALLOC_" not in k and k != "GLIBC_TUNABLES"}
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT, mode],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    kept, small, large = result.stdout.split()
    return kept, int(small), int(large)


@needs_glibc
def test_freed_blocks_are_kept_but_not_the_largest() -> None:
    kept, small, large = _stays("keep")
    assert kept == "True"
    assert small > 100
    assert large < 20
    assert _stays("leave")[1] < 20


@needs_glibc
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072"),
    ],
)
def test_settings_of_the_user_stand(name: str, value: str) -> None:
    kept, small, _ = _stays("keep", **{name: value})
    assert kept == "False"
    assert small < 20


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "confstr_names", {})
    assert not keep_freed_memory()
