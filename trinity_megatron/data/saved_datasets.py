"""Folders that Hugging Face `datasets` or Spark wrote: which of their files hold rows."""

from collections.abc import Collection
from pathlib import Path

from trinity_megatron.data.rows import shorten
from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.json_file import read_json

_DESCRIPTION = "description of a dataset"


def find_not_data(
    folder: Path, names: Collection[str], subfolders: Collection[str]
) -> dict[str, str]:
    """Files beside the data of a Hugging Face or Spark dataset, with the reason to leave them out.

    Raises:
        UserError: If files that belong to the dataset are missing.
    """
    shards = {name for name in names if name.endswith(".arrow")}
    state = _read_object(folder / "state.json") if "state.json" in names else {}
    listed = state.get("_data_files")
    left_out = {}
    if isinstance(listed, list):
        known = {str(entry.get("filename")) for entry in listed if isinstance(entry, dict)}
        _check_complete(folder, "state.json", known - set(names))
        left_out = dict.fromkeys(shards - known, "not a file of the dataset: a cache beside it")
        left_out["state.json"] = _DESCRIPTION
    if left_out or shards:
        left_out |= dict.fromkeys({"dataset_info.json"} & set(names), _DESCRIPTION)
    splits = _read_object(folder / "dataset_dict.json") if "dataset_dict.json" in names else {}
    if any(name.endswith(".parquet") for name in names):
        left_out |= dict.fromkeys({"_metadata", "_common_metadata"} & set(names), _DESCRIPTION)
    names_of_splits = splits.get("splits")
    if isinstance(names_of_splits, list):
        _check_complete(folder, "dataset_dict.json", {*map(str, names_of_splits)} - {*subfolders})
        left_out["dataset_dict.json"] = _DESCRIPTION
    return left_out


def _read_object(path: Path) -> dict[str, object]:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}  # then it is a file like others
    return value if isinstance(value, dict) else {}


def _check_complete(folder: Path, name: str, missing: Collection[str]) -> None:
    if missing:
        raise UserError(
            f"source {folder} lacks {len(missing)} parts that its {name} names "
            f"({shorten(sorted(missing))}); copy or download the dataset again"
        )
