"""Which tasks are evaluated: names of the harness, our own, and where their data are."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trinity_megatron.errors import UserError
from trinity_megatron.evaluation import niah

REMEDY = "pip install 'trinity_megatron[evaluate]', or pip install 'lm-eval>=0.4.13'"
NIAH, PERPLEXITY = "niah", "perplexity"
# Name of a file's ending -> builder of the package datasets, and how it reads a document.
_READERS: dict[str, tuple[str, dict[str, str]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "document"}),
}
type _AsDataset = Callable[[list[dict[str, Any]]], Any]
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True)
class EvaluationFlags:
    """How tasks are asked.

    Attributes:
        batch_size: Rows of a forward pass.
        max_length: Most tokens of a row; that of the model if None.
        num_fewshot: Examples before each question; the task's own number if None.
        limit: First documents of each task; all of them if None.
        apply_chat_template: Whether questions are put as a user's turn.
    """

    batch_size: int = 8
    max_length: int | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False

    def limited(self, limit: int | None) -> EvaluationFlags:
        """The same with a limit."""
        return replace(self, limit=limit)


@dataclass(frozen=True)
class TaskChoice:
    """Tasks by name.

    Attributes:
        names: As given; of the harness (also patterns), ``niah`` and ``perplexity``.
        data: Folder with YAML files of tasks and with data; None without.
        niah_lengths: Lengths of ``niah`` in tokens.
        tokenizer: transformers' tokenizer, which measures these lengths.
    """

    names: tuple[str, ...]
    data: Path | None
    niah_lengths: tuple[int, ...]
    tokenizer: Any

    def own_tasks(self, name: str, as_dataset: _AsDataset) -> list[dict[str, Any]] | None:
        """Tasks that the harness does not have, as it takes their configuration; None for others.

        Args:
            name: Of ``--tasks``.
            as_dataset: Turns rows into what the harness reads.

        Raises:
            UserError: There are no data for them, or a length is too short.
        """
        if name == NIAH:
            return [self._niah(length, as_dataset) for length in self.niah_lengths]
        if name == PERPLEXITY:
            return list(self._perplexity())
        return None

    def _niah(self, length: int, as_dataset: _AsDataset) -> dict[str, Any]:
        def count(text: str) -> int:
            return len(self.tokenizer(text).input_ids)

        try:
            samples = niah.make_samples(length, count)
        except ValueError as error:
            raise UserError(
                f"{length} tokens are too short for --tasks {NIAH}: {error}. Remedy: a longer one "
                "in --niah-lengths (train: a longer --seq-length, or another task)."
            ) from error
        rows = [vars(sample) for sample in samples]

        def dataset(**_: Any) -> Any:
            return as_dataset(rows)

        return {
            "task": f"{NIAH}_{length}",
            "custom_dataset": dataset,
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "process_results": niah.score,
            "metric_list": [{"metric": "recall", "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {
                "until": ["\n"],
                "max_gen_toks": niah.MAX_NEW_TOKENS,
                "do_sample": False,
            },
            "metadata": {"version": 1.0},
        }

    def _perplexity(self) -> Iterator[dict[str, Any]]:
        """One task for each file of ``--data DIR/perplexity``: a domain."""
        folder = (self.data or Path()) / PERPLEXITY
        files = sorted(folder.iterdir()) if self.data is not None and folder.is_dir() else []
        files = [file for file in files if file.suffix in _READERS]
        if not files:
            raise UserError(
                f"--tasks {PERPLEXITY} finds no texts. Remedy: --data DIR with a file for each "
                f"domain in DIR/{PERPLEXITY}: NAME.jsonl or NAME.parquet with a field text, or "
                "NAME.txt."
            )
        for file in files:
            builder, how = _READERS[file.suffix]
            yield {
                "task": f"{PERPLEXITY}_{file.stem}",
                "dataset_path": builder,
                "dataset_kwargs": {"data_files": {"test": str(file.absolute())}, **how},
                "test_split": "test",
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [
                    {"metric": "word_perplexity"},
                    {"metric": "byte_perplexity"},
                    {"metric": "bits_per_byte"},
                ],
                "metadata": {"version": 1.0},
            }


def split_names(text: str) -> tuple[str, ...]:
    """Names of ``--tasks``.

    Raises:
        UserError: There is none.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(f"--tasks {text!r} names no task. Remedy: --tasks NAME,NAME.")
    return names


def split_lengths(text: str | None, max_length: int) -> tuple[int, ...]:
    """Lengths of ``--niah-lengths``; that of the model if None.

    Raises:
        UserError: They are no numbers, or longer than the model reads.
    """
    if text is None:
        return (max_length,)
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--niah-lengths {text} are no numbers of tokens. Remedy: e.g. 4096,8192.")
    lengths = tuple(dict.fromkeys(map(int, words)))
    if max(lengths) > max_length:
        raise UserError(
            f"--niah-lengths {max(lengths)} is more than the {max_length} tokens of the model. "
            "Remedy: --max-length N, if it is to be tried all the same, or shorter ones."
        )
    return lengths


def check_package() -> None:
    """Refuse to go on without the harness, without importing it.

    Raises:
        UserError: It is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"Evaluating needs the package lm-eval, which is not installed. Remedy: {REMEDY}."
        )


def check_numbers(**values: int | None) -> None:
    """Refuse counts below one.

    Args:
        **values: By the name of their flag.

    Raises:
        UserError: Names the first one.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {value} is below 1. Remedy: give at least 1.")


def check_folder(data: Path | None, flag: str = "--data") -> None:
    """Refuse a folder that is not there.

    Args:
        data: The folder; None without.
        flag: That names it.

    Raises:
        UserError: It is not.
    """
    if data is not None and not data.is_dir():
        raise UserError(f"{flag} {data} is not a folder. Remedy: one with task files and data.")


def use_local_data() -> None:
    """Keep the packages of Hugging Face from the network, unless HF_HUB_OFFLINE says otherwise."""
    for name in _OFFLINE:
        os.environ.setdefault(name, os.environ.get(_OFFLINE[0], "1"))
