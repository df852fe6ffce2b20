"""Settings of the memory allocator on a CPU host.

PyTorch has no pool of its own there: every tensor is a block of the C library, and glibc hands
large freed blocks back to the kernel, which has to find and clear their pages again a moment later.
With glibc's defaults a Muon step over 64 matrices 128 x 256 met 5000 page faults: a third of its
time.
"""

import ctypes
import os

# Numbers of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The most that glibc itself would raise this threshold to; larger blocks are few.
_LARGEST_KEPT_BLOCK = 32 * 2**20
_MOST_KEPT = 2**30


def keep_freed_memory() -> bool:
    """Let glibc keep up to 1 GiB of freed memory for the next tensors.

    Blocks above 32 MiB are given back at once as before.  Idempotent; changes nothing where the
    user has set glibc's thresholds, or where the C library is another one.

    Returns:
        Whether freed memory is kept now.

    Source: mallopt(3).
    """
    if _is_set_by_user() or "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK), (_M_TRIM_THRESHOLD, _MOST_KEPT))
    return all(mallopt(name, value) == 1 for name, value in settings)


def _is_set_by_user() -> bool:
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    return "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "") or any(
        name in os.environ for name in names
    )
