"""One W&B run for one training run, online only if the user is logged in."""

import os
import secrets
from pathlib import Path


def prepare_wandb(run_dir: Path | str) -> None:
    """Set what ``wandb.init`` (called by Megatron without id or resume) reads from the environment.

    The id lies in ``run_dir``, so that a resumed training continues its W&B run.  Without an API
    key the run is kept offline, to be sent later with ``wandb sync``.  Values that the user has
    set win.

    Args:
        run_dir: Folder of the run; made if missing.
    """
    if "WANDB_MODE" not in os.environ and not _logged_in():
        os.environ["WANDB_MODE"] = "offline"
    id_file = Path(run_dir) / "wandb_run_id"
    if "WANDB_RUN_ID" not in os.environ:
        if not id_file.exists():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            id_file.write_text(secrets.token_hex(4) + "\n")
        os.environ["WANDB_RUN_ID"] = id_file.read_text().strip()
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_SILENT", "true")


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.exists() and "wandb" in netrc.read_text(errors="ignore")
