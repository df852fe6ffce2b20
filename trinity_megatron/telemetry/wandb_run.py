"""A training's run of W&B, on wandb's public API: found again by its id, offline if need be.

The only module that imports wandb.
"""

import argparse
import contextlib
import glob
import json
import logging
import os
import re
import secrets
import shutil
import ssl
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trinity_megatron.telemetry.code_version import describe_code

ID_FILE = "wandb_run_id"
# A row has some kilobytes; below this the run is closed while there is still room to close it.
MIN_FREE_BYTES = 16 << 20
_CONNECT_SECONDS = 2.0
# Defaults of wandb's own environment variables; a wandb without one of them ignores it.
ENVIRONMENT = {
    "WANDB_INIT_TIMEOUT": "20",
    "WANDB_FINISH_TIMEOUT": "60",
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",  # else every line that the training prints goes through wandb first
    "WANDB_ERROR_REPORTING": "false",  # of wandb on itself: waits up to 30 s at exit
    # What wandb holds back from its file when a kill ends both, see RowJournal; 15 s by default.
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "2",
}
_MAX_ID_LETTERS = 128


class WandbUnavailableError(RuntimeError):
    """W&B cannot be used; says why, and the remedy."""


def import_wandb() -> Any:
    """The package wandb; raises a WandbUnavailableError if it cannot be imported."""
    try:
        import wandb
    except Exception as error:
        raise WandbUnavailableError(
            f"The package wandb cannot be imported ({first_line(error)}). "
            "Remedy: pip install wandb."
        ) from None
    return wandb


def record_type() -> Any:
    """The protobuf class of a record in a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    return Record


def find_folder(args: argparse.Namespace) -> Path:
    """Where wandb makes its own folder ``wandb``."""
    inside = os.path.join(args.save, "wandb") if args.save else getattr(args, "out", None)
    return Path(args.wandb_save_dir or inside or ".").absolute()


def find_or_make_id(folders: Sequence[Path]) -> str:
    """The id of the run that saves to these folders; a new one is written to the first."""
    for folder in folders:
        file = folder / ID_FILE
        if file.is_file() and (known := _read_id(file)):
            return known
    made = secrets.token_hex(4)
    for folder in folders[:1]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ID_FILE).write_text(made + "\n")
    return made


def _read_id(file: Path) -> str:
    """The id in a file, which may have come with the folder of another run.

    Raises:
        WandbUnavailableError: It is none; wandb makes it a part of paths.
    """
    with file.open(errors="replace") as stream:
        known = stream.read(_MAX_ID_LETTERS + 2).strip()
    if known and not re.fullmatch(rf"[\w-]{{1,{_MAX_ID_LETTERS}}}", known, re.ASCII):
        raise WandbUnavailableError(
            f"{file} holds {known!r:.80}, which is no id of a run. Remedy: remove that file."
        )
    return known


def without_password(url: str) -> str:
    """An address as it may stand in a log."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def check_folder(folder: Path) -> None:
    """Make the folder; raise a WandbUnavailableError if it cannot be used or is nearly full."""
    with named_if_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise WandbUnavailableError(
            f"Its folder {folder} is full ({free >> 10} KiB left of the "
            f"{MIN_FREE_BYTES >> 20} MiB it needs). Remedy: free space there, or another "
            "--wandb-save-dir."
        )


@contextlib.contextmanager
def named_if_unwritable(folder: Path) -> Iterator[None]:
    """Turn an OSError into a WandbUnavailableError, which names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        raise WandbUnavailableError(
            f"Its folder {folder} cannot be written ({error.strerror or error}). "
            "Remedy: another --wandb-save-dir."
        ) from None


def find_files(folder: Path, run_id: str) -> list[Path]:
    """The .wandb files of a run, of all its parts in their order."""
    name = glob.escape(run_id)
    return sorted(folder.glob(f"wandb/*run-*-{name}/run-{name}.wandb"))


def why_offline(files: Sequence[Path]) -> str | None:
    """Why a run with these files is kept offline: empty if the user knows, None if it is not."""
    wandb = import_wandb()
    settings = wandb.setup().settings
    if settings.mode in ("offline", "dryrun"):
        return ""
    try:
        is_logged_in = wandb.login(prompt=False, verify=False)
    except Exception as error:
        return f"W&B's login does not work ({first_line(error)})"
    if not is_logged_in:
        asked = "WANDB_MODE" in os.environ
        return "Not logged in to W&B (remedy: `wandb login`)" if asked else ""
    if trouble := find_connection_error(url := settings.base_url):
        return f"The W&B server {without_password(url)} is out of reach ({trouble})"
    offline = (file for file in files if "offline-run" in str(file))
    if not all(file.with_name(f"{file.name}.synced").exists() for file in offline):
        return "Earlier steps of this W&B run were kept offline and are to be sent first"
    return None


def find_connection_error(url: str) -> str | None:
    """Why a server is certainly out of reach; wandb itself would try until its time is over."""
    try:
        urllib.request.build_opener().open(url, timeout=_CONNECT_SECONDS).close()
    except Exception as error:  # among them refusals of HTTP: these are answers
        reason = getattr(error, "reason", None)
        if isinstance(reason, OSError) and not isinstance(reason, ssl.SSLError | TimeoutError):
            return reason.strerror or str(reason)
    return None


def open_run(
    args: argparse.Namespace, run_id: str, is_given_up: Callable[[], bool]
) -> tuple[Any, str | None]:
    """Start or continue a run, offline where W&B cannot be reached.

    Args:
        args: Megatron's arguments; what is no JSON is not uploaded.
        run_id: Its id.
        is_given_up: Whether a start that failed is not to be repeated offline.

    Returns:
        ``wandb.Run``, and why it is offline: empty if the user knows, None if it is not.
    """
    check_folder(folder := find_folder(args))
    reason = why_offline(find_files(folder, run_id))
    start = partial(
        import_wandb().init,
        project=args.wandb_project,
        name=args.wandb_exp_name or None,
        entity=args.wandb_entity or None,
        dir=str(folder),
        id=run_id,
        resume=os.environ.get("WANDB_RESUME", "allow"),
        config={**json_values(vars(args)), **describe_code()},
    )
    run = None
    if reason is None:
        try:
            run = start()
        except Exception as error:
            if is_given_up():
                raise
            reason = f"The W&B server did not start the run ({first_line(error)})"
            teardown()  # it holds the id
    if run is None:
        run = start(mode="offline")
    # On a full disk each line of wandb's own log files would print a traceback.
    for handler in logging.getLogger("wandb").handlers:
        handler.handleError = lambda record: None  # type: ignore[method-assign]
    return run, reason


def sync_command(run: Any) -> str:
    """What sends later all that a run has written, in backquotes."""
    if run.offline:  # all parts of the run, in their order
        return f"`wandb sync {Path(run.sync_dir).parent}/offline-run-*-{run.id}`"
    return f"`wandb sync --include-online {run.sync_dir}`"


def json_values(values: dict[str, Any]) -> dict[str, Any]:
    """The values that JSON can hold."""
    kept = {}
    for name, value in values.items():
        with contextlib.suppress(TypeError, ValueError):
            json.dumps(value)
            kept[name] = value
    return kept


def first_line(error: BaseException) -> str:
    """The first line of an error's message, its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def teardown() -> None:
    """End wandb's process, whatever it answers: SystemExit, too."""
    wandb: Any = sys.modules.get("wandb")
    for _ in range(2):  # if the process has died, the first call fails before it logs out
        with contextlib.suppress(BaseException):
            wandb.teardown()
    if wandb is not None:
        wandb.run = None  # what a dead process leaves would keep the next run from logging in
