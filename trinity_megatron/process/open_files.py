"""How many files a process may have open."""

import errno
import resource

# Of a dataset of Megatron: its tokens, and maps of the tokens, the index and three arrays.
_FILES_OF_DATASET = 6
# Sockets, logs, checkpoints; a training of two gloo ranks has 60.
_OTHER_FILES = 256


def allow_open_files(datasets: int) -> None:
    """Let this process have the files of so many datasets open, as far as the system allows it.

    The soft limit is 1024 on most systems, and the hard one far above.

    Args:
        datasets: Number of Megatron's datasets.
    """
    needed = _FILES_OF_DATASET * datasets + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def explain_open_files(error: BaseException | None) -> str | None:
    """What is wrong, and the remedy, if an error says that too many files are open; else None."""
    if not isinstance(error, OSError) or error.errno != errno.EMFILE:
        return None
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"{error.filename or 'a file'} cannot be opened: this process may have {hard} open files, "
        f"and each dataset takes {_FILES_OF_DATASET}. Remedy: a higher limit (ulimit -Hn), "
        "--eval-iters 0, or fewer corpora"
    )
