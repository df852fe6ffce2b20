"""What Megatron offers beside its plain step: each is on, works when asked for, or is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ALLTOALL = {"moe_token_dispatcher_type": "alltoall"}
FLEX = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
NCCL_EP = {**FLEX, "moe_flex_dispatcher_backend": "ncclep"}
TE, DEEP_EP = ["transformer_engine"], ["deep_ep"]
APEX = ["fused_weight_gradient_mlp_cuda"]
# Flag, arguments, packages, and whether it is refused: on a GPU, without one.
CASES: list[tuple[str, dict[str, Any], list[str], bool, bool]] = [
    ("--moe-permute-fusion", {}, TE, False, True),
    ("--moe-permute-fusion", {}, [], True, True),
    ("--moe-token-dispatcher-type", ALLTOALL, [], False, False),
    ("--moe-token-dispatcher-type", FLEX, [], True, True),
    ("--moe-token-dispatcher-type", FLEX, TE, True, True),
    ("--moe-token-dispatcher-type", FLEX, DEEP_EP, False, True),
    ("--moe-token-dispatcher-type", NCCL_EP, TE, False, True),
    ("--moe-flex-dispatcher-backend", FLEX, DEEP_EP, False, True),
    ("--moe-flex-dispatcher-backend", ALLTOALL, DEEP_EP, True, True),
    ("--moe-enable-deepep", FLEX, [], True, True),
    ("--overlap-moe-expert-parallel-comm", {}, TE, True, True),
    ("--delay-wgrad-compute", {}, TE, True, True),
    ("--cuda-graph-impl", {"cuda_graph_impl": "local"}, TE, True, True),
    ("--enable-cuda-graph", {}, TE, True, True),
    ("--external-cuda-graph", {}, TE, True, True),
    ("--optimizer-cuda-graph", {}, [], True, True),
    ("--defer-embedding-wgrad-compute", {}, [], True, True),
    ("--defer-embedding-wgrad-compute", {}, APEX, False, True),
]
# In a process of its own: the host is chosen once.
SCRIPT = """
import importlib, json, sys
from argparse import Namespace
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.training.arguments.unsupported import load_reasons

def answers():
    for flag, given, packages, *_ in json.loads(sys.argv[2]):
        sys.path[:0] = [f"{sys.argv[1]}/{package}" for package in packages]
        importlib.invalidate_caches()
        (reason,) = (reason for reason in load_reasons() if flag in reason.flags)
        yield bool(reason.refused) and reason.holds(Namespace(optimizer="muon", **given))
        del sys.path[: len(packages)]

result = [list(answers())]
enter_host()
print(json.dumps([*result, list(answers())]))
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bool, bool]]:
    """Whether each case is refused: on a host that has not found its GPU missing, and on one."""
    folder: Path = tmp_path_factory.mktemp("packages")
    for package in TE + DEEP_EP + APEX:
        (folder / package).mkdir()
        (folder / package / f"{package}.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), json.dumps(CASES)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return list(zip(*json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n][0]}-{n}")
def test_what_is_refused(number: int, refused: list[tuple[bool, bool]]) -> None:
    *_, on_gpu, on_cpu = CASES[number]
    assert refused[number] == (on_gpu, on_cpu)
