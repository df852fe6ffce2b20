"""GPUs and the links between them."""

from dataclasses import dataclass

from trinity_megatron.errors import UserError

_GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU in its node, dense rates, links in one direction.

    Attributes:
        name: As ``--gpu`` takes it.
        title: As its vendor writes it.
        bf16_flops: FLOP/s of the data sheet.
        fp8_flops: FLOP/s of the data sheet.
        memory_bytes: As the driver reports it, not as the data sheet does.
        memory_bandwidth: Bytes/s.
        nvlink: Bytes/s of a GPU into its NVLink domain.
        nvlink_domain: GPUs of an NVLink domain.
        network: Bytes/s of a GPU out of its NVLink domain.
        capability: Compute capability.
        reserved: Memory that the allocator reserves over what is allocated, [low, high].
        tables: Name of the system in ``aiconfigurator-core``.
    """

    name: str
    title: str
    bf16_flops: float
    fp8_flops: float
    memory_bytes: float
    memory_bandwidth: float
    nvlink: float
    nvlink_domain: int
    network: float
    capability: tuple[int, int]
    reserved: tuple[float, float]
    tables: str


# Reserved over allocated: +2.5% seen on GB200 (177,582 MiB reserved in Megatron-LM's own logs), +7
# to 21% on H100 (Megatron-Bridge, activation-recompute and memory-snapshot studies, 2026-08).
_BLACKWELL, _HOPPER = (1.025, 1.07), (1.07, 1.21)

# Rates and links: NVIDIA's data sheets, as aiconfigurator-core 0.12 states them (systems/*.yaml);
# memory: nvidia-smi, from the same files.  B200's network is that of CX7; CX8 has twice.
_GPUS = (
    Gpu("h100", "H100 SXM", 989e12, 1978e12, 80 * _GIB, 3.35e12, 450e9, 8, 50e9, (9, 0), _HOPPER,
        "h100_sxm"),
    Gpu("h200", "H200 SXM", 989e12, 1978e12, 140 * _GIB, 4.8e12, 450e9, 8, 50e9, (9, 0), _HOPPER,
        "h200_sxm"),
    Gpu("b200", "B200", 2250e12, 4500e12, 180 * _GIB, 8e12, 900e9, 8, 50e9, (10, 0), _BLACKWELL,
        "b200_sxm"),
    Gpu("b300", "B300", 2250e12, 4500e12, 268.6 * _GIB, 7.75e12, 900e9, 8, 100e9, (10, 3),
        _BLACKWELL, "b300_sxm"),
    Gpu("gb200", "GB200 NVL72", 2500e12, 5000e12, 185.0 * _GIB, 8e12, 900e9, 72, 100e9, (10, 0),
        _BLACKWELL, "gb200"),
    Gpu("gb300", "GB300 NVL72", 2500e12, 5000e12, 277.5 * _GIB, 8e12, 900e9, 72, 100e9, (10, 3),
        _BLACKWELL, "gb300"),
)  # fmt: skip
GPUS = {gpu.name: gpu for gpu in _GPUS}


def get_gpu(name: str) -> Gpu:
    """Look up a GPU.

    Raises:
        UserError: It is not in the table; the message lists those that are.
    """
    gpu = GPUS.get(name.lower().replace("-", "").removesuffix("sxm").removesuffix("nvl72"))
    if gpu is None:
        raise UserError(f"--gpu {name!r} is unknown. Remedy: choose one of {', '.join(GPUS)}.")
    return gpu
