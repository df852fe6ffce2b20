"""A temporary folder that can hold what a run puts there: sockets, whose paths are short."""

import os
import socket
import sys
import tempfile
from pathlib import Path

from trinity_megatron.errors import UserError

# Beside Python's own choice; /dev/shm is there where a container has no /tmp.
_OTHERS = ("/tmp", "/var/tmp", "/dev/shm")
# multiprocessing's, and random letters as many as it adds.
_SOCKET_FOLDER, _SOCKET = "pymp-", "listener-12345678"
_MESSAGE = b"x" * 4096


def use_short_temporary_folder(room: int = 0) -> None:
    """Let ``TMPDIR`` name a folder in which sockets can be made, for this process and its children.

    A checkpoint is saved through sockets of multiprocessing, and the path of a socket has at most
    107 bytes.  A folder that will do stays; costs a millisecond.

    Args:
        room: Bytes that the name of a folder in it adds to the path.

    Raises:
        UserError: No folder will do.
    """
    names = ("TMPDIR", "TEMP", "TMP")  # as Python's tempfile looks at them
    name, given = next(((n, v) for n in names if (v := os.environ.get(n))), ("TMPDIR", ""))
    reasons: dict[str, str] = {}
    for folder in dict.fromkeys((given, *_OTHERS)):
        if folder and (reason := why_unusable(folder, room)):
            reasons[folder] = reason
        elif folder:
            break
    else:
        what = "; ".join(f"{folder} {reason}" for folder, reason in reasons.items())
        raise UserError(
            "TMPDIR: no temporary folder can hold the sockets that a checkpoint is saved through "
            f"({what}). Remedy: TMPDIR=FOLDER, a short path on a local disk with free space."
        )
    if not reasons:
        return
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None  # chosen again
    if given and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"> {name} {given} {reasons[given]}; {folder} is used", file=sys.stderr, flush=True)


def why_unusable(folder: str, room: int = 0) -> str | None:
    """What stands against a temporary folder; None if sockets and files can be made in it.

    Args:
        folder: To look at.
        room: See :func:`use_short_temporary_folder`.
    """
    if not Path(folder).is_dir():
        return "is not there"
    try:
        with tempfile.TemporaryDirectory(prefix=_SOCKET_FOLDER + "x" * room, dir=folder) as path:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.path.join(path, _SOCKET))
            Path(path, "file").write_bytes(_MESSAGE)
    except OSError as error:
        # Python's own check of the length has no number.
        return error.strerror or f"is too long for a socket ({len(os.fsencode(folder))} bytes)"
    return None
