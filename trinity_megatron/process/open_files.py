"""How many files a process may have open."""

import resource

from trinity_megatron.errors import UserError

# Sockets, logs, checkpoints; a training of two gloo ranks has 111.
_OTHER_FILES = 256


def allow_open_files(datasets: int) -> None:
    """Let this process have a file open for each dataset, as Megatron's readers do.

    The soft limit is 1024 on most systems, and the hard one far above.

    Args:
        datasets: Number of all that the run may read.

    Raises:
        UserError: The system's limit is lower.
    """
    needed = datasets + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"--data: its {datasets} datasets are open at the same time, and a process may have "
            f"{hard} open files. Remedy: a higher limit (ulimit -Hn {needed}), or fewer corpora."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
