"""The W&B run of a training: found again after a stop, offline where the server is out of reach.

The only module that imports wandb.
"""

import argparse
import contextlib
import glob
import importlib.metadata
import json
import logging
import os
import secrets
import shutil
import socket
import struct
import subprocess
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

import trinity_megatron
from trinity_megatron.telemetry.wandb_writer import (
    ArtifactRequest,
    Picture,
    WandbUnavailableError,
    WandbWriter,
    call_quietly,
)

logger = logging.getLogger(__name__)

ID_FILE = "wandb_run_id"
# A row has some kilobytes; below this the run is closed while there is still room to close it.
MIN_FREE_BYTES = 16 << 20
_PROBE_BYTES = 64 << 10
_CONNECT_SECONDS = 5.0
_OFFLINE_CLOSE_SECONDS = 30.0
_CLOSE_MARGIN_SECONDS = 15.0
_GIT_SECONDS = 10.0
# wandb's settings, each unless its variable (WANDB_...) is set.
_SETTINGS: dict[str, Any] = {
    "init_timeout": 20.0,
    "finish_timeout": 60.0,
    "finish_timeout_raises": True,
    "silent": True,
    # Else every line that the training prints goes through wandb first.
    "console": "off",
    # What a kill may cost, see the journal of the writer; 15 s by default.
    "x_transaction_log_flush_interval": 2.0,
}


def open_writer(args: argparse.Namespace) -> WandbWriter | None:
    """Megatron's W&B writer: its flags, guarded; its ``start()`` starts the run.

    Args:
        args: Megatron's arguments, and ``out``.

    Returns:
        None where Megatron has none (not the last rank, no project), and with WANDB_MODE=disabled.
    """
    if not args.wandb_project or args.rank != args.world_size - 1:
        return None
    if os.environ.get("WANDB_MODE") == "disabled":
        return None
    # wandb sends reports on itself, and waits up to 30 s at exit for a server out of reach.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    save, out = args.save, getattr(args, "out", None)
    folder = args.wandb_save_dir or (os.path.join(save, "wandb") if save else out or ".")
    run = WandbRun(
        project=args.wandb_project,
        name=args.wandb_exp_name or None,
        entity=args.wandb_entity or None,
        folder=Path(folder),
        id_folders=[Path(path) for path in (save, out) if path],
        config=dict(vars(args)),
        tensorboard_dir=getattr(args, "tensorboard_dir", None),
    )
    return WandbWriter(run)


class WandbRun:
    """One W&B run; a :class:`WandbBackend`.

    Args:
        project: Project.
        name: Name to show; W&B makes one up if None.
        entity: Owner of the project; the user's default if None.
        folder: Where wandb makes its own folder ``wandb``.
        id_folders: Where the id of the run is looked for; it is written to the first.
        config: Values to upload; what is no JSON is left out.
        tensorboard_dir: For messages.
    """

    def __init__(
        self,
        *,
        project: str,
        name: str | None,
        entity: str | None,
        folder: Path,
        id_folders: Sequence[Path],
        config: dict[str, Any],
        tensorboard_dir: str | None = None,
    ) -> None:
        self.project, self.entity = project, entity or ""
        self.url: str | None = None
        self.folder = folder.absolute()
        self.id = ""
        self._name, self._id_folders, self._config = name, id_folders, config
        self._tensorboard_dir = tensorboard_dir
        self._wandb: Any = None
        self._run: Any = None
        self._is_offline = self._is_killed = False
        self._file: Path | None = None  # the .wandb file
        self._file_number: int | None = None
        self._sent = -1

    @property
    def journal(self) -> Path:
        """File for the latest rows."""
        return self.folder / "wandb" / f"journal-{self.id}.jsonl"

    @property
    def close_seconds(self) -> float:
        """Time that :meth:`close` may take: the upload's own limit, and some."""
        if self._is_offline:
            return _OFFLINE_CLOSE_SECONDS
        return _CLOSE_MARGIN_SECONDS + float(
            os.environ.get("WANDB_FINISH_TIMEOUT") or str(_SETTINGS["finish_timeout"])
        )

    def prepare(self) -> None:
        """Find the id, try the folder, start wandb's process.

        Raises:
            WandbUnavailableError: wandb is missing, or the folder cannot be used.
        """
        self._wandb = _import_wandb()
        check_folder(self.folder)
        self.id = os.environ.get("WANDB_RUN_ID") or find_or_make_id(self._id_folders)
        session = self._wandb.setup(self._settings())
        if session.settings.mode == "disabled":
            raise WandbUnavailableError("")
        session.ensure_service()

    def open(self) -> int:
        """Start or continue the run.

        Returns:
            The last step that W&B has of it, -1 if none.
        """
        self._config = {**json_values(self._config), **describe_code()}
        last_step = max(map(last_history_step, self._files()), default=-1)
        self._run = self._start(self._why_offline(self._wandb.setup().settings))
        self._file = Path(self._run.settings.sync_file)
        self._file_number = _file_number(self._file)
        _silence_log_errors()
        self.entity = self._run.entity or self.entity
        if self._is_offline:
            return last_step
        self.url = self._run.url
        # The server knows: what an outage kept from it is sent again.
        return self._run.starting_step - 1

    def log(self, row: dict[str, Any], step: int) -> None:
        """Add to the row of a step; written when the next step begins."""
        image = self._wandb.Image
        values = {n: image(v.pixels) if isinstance(v, Picture) else v for n, v in row.items()}
        self._run.log(values, step=step)
        self._sent = step

    def update_config(self, values: dict[str, Any]) -> None:
        """Add to the configuration; after a resume values may differ."""
        self._run.config.update(values, allow_val_change=True)

    def log_artifact(self, artifact: ArtifactRequest, aliases: Sequence[str] | None) -> None:
        """Record a checkpoint."""
        real = self._wandb.Artifact(artifact.name, type=artifact.type, metadata=artifact.metadata)
        for method, args, kwargs in artifact.calls:
            getattr(real, method)(*args, **kwargs)
        self._run.log_artifact(real, aliases=aliases)

    def get_type(self, name: str) -> Any:
        """A data type of wandb."""
        return getattr(_import_wandb(), name)

    def check(self) -> None:
        """Find out what wandb keeps to itself: its file is gone, or its disk full.

        Raises:
            WandbUnavailableError: With the folder and the remedy.
        """
        assert self._file is not None
        number = _file_number(self._file)
        self._file_number = self._file_number or number  # wandb may make it late
        if number != self._file_number:
            raise WandbUnavailableError(f"{self._file.parent} was removed during the run.")
        check_free_space(self.folder)

    def close(self, exit_code: int) -> None:
        """Finish the run, end wandb's process, and see whether the file is complete.

        Raises:
            WandbUnavailableError: The server did not take all in time, or steps are missing.
        """
        run, self._run = self._run, None
        try:
            if run is not None:
                run.finish(exit_code=exit_code)
        except TimeoutError:
            limit = self.close_seconds - _CLOSE_MARGIN_SECONDS
            raise WandbUnavailableError(
                f"{run.settings.base_url} did not take all data within {limit:.0f} s."
            ) from None
        finally:
            # At exit it would wait, and print what fails.
            call_quietly(lambda: self._wandb.teardown())
        if run is None or self._file is None:
            return
        written = last_history_step(self._file)
        if written < self._sent:
            raise WandbUnavailableError(
                f"{self._file} holds the steps up to {written}, but {self._sent} were logged: "
                "the folder could not be written."
            )

    def kill(self) -> None:
        """Kill wandb's process, on which a call waits."""
        self._is_killed = True
        # No public way leads to it.
        call_quietly(lambda: self._wandb.setup()._connection._proc._process.kill())

    def remains(self) -> str:
        """Where the data is."""
        where = f" in {self._tensorboard_dir}" if self._tensorboard_dir else ""
        metrics = f"TensorBoard has all metrics{where}."
        if self._file is None or not self._file.exists():
            return metrics
        return f"What was written until then is kept: {self._sync_command()} sends it. {metrics}"

    def _sync_command(self) -> str:
        if self._is_offline:  # all parts of the run, in their order
            return f"`wandb sync {self.folder}/wandb/offline-run-*-{self.id}`"
        assert self._file is not None
        return f"`wandb sync --include-online {self._file.parent}`"

    def _files(self) -> list[Path]:
        """The .wandb files of this run, of all its parts."""
        name = glob.escape(self.id)
        return sorted(self.folder.glob(f"wandb/*run-*-{name}/run-{name}.wandb"))

    def _settings(self) -> Any:
        known = self._wandb.Settings.model_fields
        return self._wandb.Settings(
            **{
                name: value
                for name, value in _SETTINGS.items()
                if name in known and f"WANDB_{name.upper()}" not in os.environ
            }
        )

    def _why_offline(self, settings: Any) -> str | None:
        """Why the run is kept offline: empty if the user knows, None if it is not."""
        if settings.mode in ("offline", "dryrun"):
            return ""
        try:
            is_logged_in = self._wandb.login(prompt=False, verify=False)
        except Exception as error:
            return f"W&B's login does not work ({_first_line(error)})"
        if not is_logged_in:
            asked = "WANDB_MODE" in os.environ
            return "Not logged in to W&B (remedy: `wandb login`)" if asked else ""
        if trouble := find_connection_error(settings.base_url):
            return f"The W&B server {settings.base_url} is out of reach ({trouble})"
        if any("offline-run" in str(f) and not _is_synced(f) for f in self._files()):
            return "Earlier steps of this W&B run were kept offline and are to be sent first"
        return None

    def _start(self, why_offline: str | None) -> Any:
        if why_offline is None:
            try:
                return self._init(None)
            except Exception as error:
                if self._is_killed:
                    raise
                why_offline = f"The W&B server did not start the run ({_first_line(error)})"
                call_quietly(self._wandb.teardown)  # it holds the id
                self._wandb.setup(self._settings())
        self._is_offline = True
        run = self._init("offline")
        if why_offline:
            logger.warning(
                "%s: this run is kept offline; %s sends it later.",
                why_offline,
                self._sync_command(),
            )
        return run

    def _init(self, mode: str | None) -> Any:
        (self.folder / "wandb").mkdir(exist_ok=True)
        return self._wandb.init(
            project=self.project,
            name=self._name,
            entity=self.entity or None,
            dir=str(self.folder),
            id=self.id,
            resume=os.environ.get("WANDB_RESUME", "allow"),
            config=self._config,
            mode=mode,
            settings=self._settings(),
        )


def find_or_make_id(folders: Sequence[Path]) -> str:
    """The id of the run that saves to these folders; a new one is written to the first."""
    for folder in folders:
        file = folder / ID_FILE
        if file.is_file() and (known := file.read_text().strip()):
            return known
    made = secrets.token_hex(4)
    if folders:
        folders[0].mkdir(parents=True, exist_ok=True)
        (folders[0] / ID_FILE).write_text(made + "\n")
    return made


def check_folder(folder: Path) -> None:
    """Make the folder and try to write to it.

    Raises:
        WandbUnavailableError: Names the folder, what is wrong, and the remedy.
    """
    probe = folder / f".wandb_probe_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_free_space(folder)
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise WandbUnavailableError(
            f"Its folder {folder} cannot be written ({error.strerror or error}). "
            "Remedy: another --wandb-save-dir."
        ) from None


def check_free_space(folder: Path) -> None:
    """Refuse a folder that is nearly full.

    Raises:
        WandbUnavailableError: Names the folder, what is left, and the remedy.
    """
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise WandbUnavailableError(
            f"Its folder {folder} is full ({free >> 10} KiB left of the "
            f"{MIN_FREE_BYTES >> 20} MiB it needs). Remedy: free space there, or another "
            "--wandb-save-dir."
        )


def find_connection_error(url: str) -> str | None:
    """Why no connection to the server, or to the proxy before it, can be made; None if it can.

    wandb itself tries for a minute and a half.
    """
    address = urlsplit(url)
    proxy = urllib.request.getproxies().get(address.scheme)
    if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), _CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def describe_code() -> dict[str, Any]:
    """Versions, and the git commit of the working directory or else of this package, if any."""
    versions = {"trinity_megatron": trinity_megatron.__version__, "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["megatron-core"] = importlib.metadata.version("megatron-core")
    folders = (Path.cwd(), Path(trinity_megatron.__file__).parent)
    commits = (read_git_commit(folder) for folder in folders)
    return {"versions": versions, "git_commit": next((c for c in commits if c), None)}


def read_git_commit(folder: Path) -> str | None:
    """The commit that is checked out around a folder; None without git or a checkout."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def json_values(values: dict[str, Any]) -> dict[str, Any]:
    """The values that JSON can hold."""
    kept = {}
    for name, value in values.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            continue
        kept[name] = value
    return kept


_MAGIC = b":W&B"
_HEADER_BYTES = 7  # of the file, and of each piece of a record
_BLOCK_BYTES = 32 << 10
_TAIL_BYTES = 1 << 20
_FULL, _FIRST, _LAST = 1, 2, 4


def last_history_step(file: Path) -> int:
    """The last step in a .wandb file, -1 if it has none; a cut or damaged end is left out.

    Only the end of a long file is read.
    """
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            start = max(0, (size - _TAIL_BYTES) // _BLOCK_BYTES * _BLOCK_BYTES)
            for begin in dict.fromkeys((start, 0)):
                stream.seek(begin)
                steps = list(_history_steps(stream.read(), at_start=begin == 0))
                if steps:
                    return max(steps)
    except OSError:
        pass
    return -1


def _history_steps(data: bytes, *, at_start: bool) -> Iterator[int]:
    from wandb.proto import wandb_internal_pb2

    for content in read_records(data, at_start=at_start):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            yield record.history.step.num


def read_records(data: bytes, *, at_start: bool = True) -> Iterator[bytes]:
    """Split a .wandb file, or what follows a border of its blocks, into records.

    Source: the log format of LevelDB (doc/log_format.md), with zlib's CRC and a header before it.
    """
    if at_start and data[:4] != _MAGIC:
        return
    position, parts = _HEADER_BYTES if at_start else 0, None
    while True:
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _HEADER_BYTES:
            position += left
        piece = data[position : position + _HEADER_BYTES]
        if len(piece) < _HEADER_BYTES:
            return
        checksum, length, kind = struct.unpack("<IHB", piece)
        position += _HEADER_BYTES
        content = data[position : position + length]
        position += length
        if zlib.crc32(content, zlib.crc32(bytes([kind]))) != checksum:
            return
        if kind in (_FULL, _FIRST):
            parts = b""
        if parts is None:  # the rest of a record that began before
            continue
        parts += content
        if kind in (_FULL, _LAST):
            yield parts
            parts = None


def _import_wandb() -> Any:
    try:
        import wandb
    except Exception as error:
        raise WandbUnavailableError(
            f"The package wandb cannot be imported ({_first_line(error)}). "
            "Remedy: pip install wandb."
        ) from None
    return wandb


def _silence_log_errors() -> None:
    """Let wandb's own log files fail in silence: on a full disk each line prints a traceback."""
    for handler in logging.getLogger("wandb").handlers:
        handler.handleError = lambda record: None  # type: ignore[method-assign]


def _file_number(file: Path) -> int | None:
    """What changes when the file is replaced; None if there is none."""
    try:
        return file.stat().st_ino
    except OSError:
        return None


def _is_synced(file: Path) -> bool:
    return file.with_name(f"{file.name}.synced").exists()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
