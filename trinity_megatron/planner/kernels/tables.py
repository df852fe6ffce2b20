"""Which measurements a plan uses: an installed package's, or the table that comes with ours."""

import json
from functools import cache
from pathlib import Path

from trinity_megatron.planner.hardware import Gpu
from trinity_megatron.planner.kernels import extract
from trinity_megatron.planner.kernels.rates import KernelRates, RateTable

_TABLE = Path(__file__).with_name("rates.json")


@cache
def load_own_table() -> RateTable:
    """The table that comes with this package."""
    return json.loads(_TABLE.read_text(encoding="utf-8"))


@cache
def load_rates(gpu: Gpu, *, own: bool = False) -> KernelRates:
    """Rates of a GPU: of an installed ``aiconfigurator-core``, else of the table of our own.

    Args:
        gpu: The GPU.
        own: Take the table of our own in any case.
    """
    table = load_own_table()
    source = table["source"]
    data = None if own else extract.find_package()
    if data is not None:
        try:
            return KernelRates(gpu, extract.read_gpu(gpu, data), f"{extract.version()}, installed")
        except (OSError, LookupError, ValueError) as error:  # another release, other tables
            source += f"; those of {extract.version()} cannot be read ({error})"
    return KernelRates(gpu, table["gpus"][gpu.name], source)
