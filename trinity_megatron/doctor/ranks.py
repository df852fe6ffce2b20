"""Several ranks: their answers compared, and the bandwidth between their machines."""

import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import combinations
from typing import Any

from trinity_megatron.doctor.finding import Finding

_TIMEOUT = timedelta(minutes=5)
_MESSAGE = 2**25
# Values that differ from rank to rank in a healthy world.
_OWN = ("host",)
_SHOWN = 6


def facts_of(findings: Sequence[Finding], environment: Mapping[str, str]) -> dict[str, str]:
    """What a rank tells the others: its machine, its packages, and its lines without numbers."""
    import importlib.metadata

    facts = {"host": socket.gethostname()}
    for each in importlib.metadata.distributions():
        facts[f"package {each.name}"] = each.version
    for name in ("LD_LIBRARY_PATH", "NCCL_SOCKET_IFNAME", "CUDA_DEVICE_MAX_CONNECTIONS"):
        facts[f"variable {name}"] = environment.get(name, "unset")
    for finding in findings:
        facts[f"level of {finding.name}"] = finding.level
    return facts


def compare_facts(facts: Sequence[Mapping[str, str]]) -> Iterator[Finding]:
    """Name the ranks that differ from most others.

    Args:
        facts: Of each rank.
    """
    names = sorted({name for each in facts for name in each if name not in _OWN})
    odd = 0
    for name in names:
        values = [each.get(name, "missing") for each in facts]
        usual, count = Counter(values).most_common(1)[0]
        if count == len(values):
            continue
        odd += 1
        others = [
            f"rank {rank} ({facts[rank]['host']}): {value}"
            for rank, value in enumerate(values)
            if value != usual
        ]
        if odd <= _SHOWN:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            yield Finding(
                f"ranks, {name}",
                "red",
                f"{'; '.join(others[:3])}{more}; the others: {usual}",
                "the same environment on every machine",
            )
    if odd > _SHOWN:
        yield Finding("ranks", "red", f"{odd} values differ", "the same environment everywhere")
    if not odd:
        hosts = {each["host"] for each in facts}
        yield Finding("ranks", "green", f"{len(facts)} on {len(hosts)} machines answer alike")


def examine_world(
    findings: Sequence[Finding], environment: Mapping[str, str]
) -> list[Finding] | None:
    """Compare the ranks of this world and measure between machines; lines on rank 0, else None.

    Args:
        findings: Of this rank.
        environment: Of the process, with ``RANK`` and what else torchrun sets.
    """
    import torch.distributed as dist

    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        gathered: list[Any] | None = [None] * size if rank == 0 else None
        dist.gather_object(facts_of(findings, environment), gathered)
        shared = [[facts["host"] for facts in gathered] if gathered else None]
        dist.broadcast_object_list(shared)
        rates = measure_pairs(shared[0] or [])
        if gathered is None:
            return None
        return [*compare_facts(gathered), *describe_rates(rates)]
    finally:
        dist.destroy_process_group()


def measure_pairs(hosts: Sequence[str]) -> dict[tuple[str, str], float]:
    """Bytes/s between the first ranks of each two machines, one pair after the other.

    Args:
        hosts: Machine of each rank.

    Returns:
        By the names of the two machines; on rank 0.
    """
    import torch
    import torch.distributed as dist

    leaders = {host: hosts.index(host) for host in dict.fromkeys(hosts)}
    rank, found = dist.get_rank(), {}
    for first, second in combinations(leaders, 2):
        pair = (leaders[first], leaders[second])
        message, seconds = torch.zeros(_MESSAGE, dtype=torch.uint8), torch.zeros(1)
        if rank in pair:
            other = pair[1] if rank == pair[0] else pair[0]
            for is_timed in (False, True):
                begin = time.perf_counter()
                dist.send(message, other) if rank == pair[0] else dist.recv(message, other)
                dist.recv(message, other) if rank == pair[0] else dist.send(message, other)
                if is_timed:
                    seconds[0] = time.perf_counter() - begin
        dist.broadcast(seconds, pair[0])
        found[first, second] = 2 * _MESSAGE / float(seconds)
    return found


def describe_rates(rates: Mapping[tuple[str, str], float]) -> Iterator[Finding]:
    """Name the pair of machines that is much slower than the others.

    Args:
        rates: Bytes/s by pair.
    """
    if not rates:
        return
    ordered = sorted(rates.values())
    middle = ordered[len(ordered) // 2]
    slow = {pair: rate for pair, rate in rates.items() if rate < 0.5 * middle}
    text = f"{ordered[0] / 1e9:.2f} to {ordered[-1] / 1e9:.2f} GB/s over gloo, {len(rates)} pairs"
    if slow:
        pair = min(slow, key=lambda each: slow[each])
        yield Finding(
            "network", "red", f"{pair[0]} and {pair[1]}: {slow[pair] / 1e9:.2f} GB/s; {text}",
            "leave out the slow machine, or mend its link (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
        )  # fmt: skip
    else:
        yield Finding("network", "green", text)
