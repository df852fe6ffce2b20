"""Seconds of a collective over ranks of one or several NVLink domains."""

from trinity_megatron.planner.constants import Constants
from trinity_megatron.planner.kernels.rates import KernelRates


def collective_seconds(
    rates: KernelRates,
    constants: Constants,
    collective: str,
    message: float,
    size: int,
    stride: int,
) -> float:
    """Seconds of one collective in which every rank of a group takes part.

    Within a domain the measured rates hold.  Across domains the network carries what comes from
    other domains, once for each domain for a gathering or a reduction (its ranks there share it),
    row by row for an all-to-all; the slower of the two counts.

    Args:
        rates: Of the GPU.
        constants: Of the step model.
        collective: ``all_gather``, ``reduce_scatter`` or ``all_to_all``.
        message: Bytes of the whole message; for an all-to-all: of what one rank sends.
        size: Ranks of the group.
        stride: Distance of neighbours in the group, in ranks.
    """
    if size <= 1 or message <= 0:
        return 0.0
    gpu = rates.gpu
    inside = max(1, min(size, gpu.nvlink_domain // stride))
    domains = size / inside
    seconds = 0.0
    if inside > 1:
        share = message if collective != "all_to_all" else message / domains
        leaving = share * (inside - 1) / inside
        seconds = leaving / rates.link(collective, share)
    if domains > 1:
        crossing = message * (1 - 1 / domains)
        if collective != "all_to_all":
            crossing /= inside
        seconds = max(seconds, crossing / (constants.network * gpu.network))
    return seconds
