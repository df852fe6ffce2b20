"""``prepare-data`` as tasks: the same folder as one process makes, shard by shard."""

from __future__ import annotations

import hashlib
import logging
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from trinity_megatron.data.cluster.engines import Engine
from trinity_megatron.data.cluster.result_file import load_result
from trinity_megatron.data.cluster.tasks import EncodeTask, ScanTask
from trinity_megatron.data.corpus import (
    ReadOptions,
    Skipped,
    SourceFile,
    check_separator,
    find_files,
)
from trinity_megatron.data.encode import SplitWriter
from trinity_megatron.data.inputs import DataInputs
from trinity_megatron.data.left_out import LeftOut, check_formats
from trinity_megatron.data.manifest import DataManifest, SplitSummary
from trinity_megatron.data.output_folder import (
    SPLITS,
    check_out,
    find_existing,
    locked,
    remove_half_written,
)
from trinity_megatron.data.prepare import (
    build_folder,
    check_settings,
    load_given,
    make_inputs,
    write_folder,
)
from trinity_megatron.data.scan import Corpus
from trinity_megatron.errors import UserError

logger = logging.getLogger(__name__)
_TASKS_PER_WORKER = 4  # so that one long task at the end does not keep all others waiting
_DEFAULTS = ReadOptions()


def prepare_on_cluster(
    out: Path,
    sources: Sequence[Path],
    engine: Engine,
    *,
    tokenizer: Path,
    validation_fraction: float = 0.05,
    options: ReadOptions = _DEFAULTS,
    max_left_out: float = 0.1,
) -> DataManifest:
    """Write what :func:`prepare_data` writes, byte for byte, by the tasks of an engine.

    The tasks' results lie beside ``out`` until it is complete: a command that was stopped goes on
    with what is missing.

    Args:
        out: The folder to write; all machines must see it and the sources.
        sources: See :func:`prepare_data`.
        engine: Where the tasks run.
        tokenizer: Folder of a tokenizer.
        validation_fraction: See :func:`prepare_data`.
        options: See :func:`prepare_data`.
        max_left_out: See :func:`prepare_data`.

    Raises:
        UserError: As :func:`prepare_data`; or the engine cannot be used, or tasks have failed.
    """
    check_settings(validation_fraction, max_left_out)
    out = Path(out).resolve()
    check_out(out)
    engine.check()
    given = load_given(tokenizer, out)
    files, skipped = find_files(sources, exclude=out, options=options)
    check_formats(skipped, files, max_left_out)
    with locked(out):
        work = _Work(out.with_name(f".{out.name}.tasks"), files, options, engine)
        digests, corpus = work.scan(LeftOut(skipped), max_left_out)
        names = sorted((file.name, digest) for file, digest in zip(files, digests, strict=True))
        inputs = make_inputs(files, names, options, given.vocab_size, validation_fraction, given)
        existing = find_existing(out, inputs)
        if existing is None:
            remove_half_written(out)
            existing = build_folder(
                out,
                inputs,
                files,
                lambda folder: write_folder(folder, inputs, corpus, given, work.encode),
            )
        shutil.rmtree(work.folder)
        return existing


class _Work:
    """The tasks of a preparation and their folder.

    Args:
        folder: Of results, logs and marks.
        files: The source files.
        options: How documents are found.
        engine: Where the tasks run.
    """

    def __init__(
        self, folder: Path, files: Sequence[SourceFile], options: ReadOptions, engine: Engine
    ) -> None:
        self.folder, self.files, self.options, self.engine = folder, files, options, engine
        self.groups = self._keep_plan()
        self._num_documents: list[int] = []

    def _keep_plan(self) -> list[list[SourceFile]]:
        """The files of each task: those of an earlier command, if nothing has changed."""
        plan = self.folder / "plan.pickle"
        if plan.is_file():
            files, options, groups = load_result(plan)
            if files == list(self.files) and options == self.options:
                logger.info("going on with %d tasks in %s", len(groups), self.folder)
                return groups
            logger.info("%s is of other sources; beginning again", self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        groups = group_files(self.files, _TASKS_PER_WORKER * self.engine.workers)
        temporary = plan.with_suffix(".tmp")
        temporary.write_bytes(pickle.dumps((list(self.files), self.options, groups)))
        temporary.replace(plan)
        return groups

    def scan(self, left_out: LeftOut, max_left_out: float) -> tuple[list[str], Corpus]:
        """Look at all files.

        Args:
            left_out: Gets what is left out, as one process finds it.
            max_left_out: Largest share of it.

        Returns:
            SHA-256 of each file, and the corpus.

        Raises:
            UserError: A file is at fault, or too much is left out.
        """
        folder = self.folder / "scan"
        task = ScanTask(self.groups, self.options, folder)
        self.engine.run([task], len(self.groups), folder)
        found = [task.load(rank) for rank in range(len(self.groups))]
        self._raise_problem([scanned.problem for scanned in found], folder)
        entries = [entry for scanned in found for entry in scanned.skipped]
        _check_bad_rows(entries, self.options)
        check_separator(self.options, set().union(*(scanned.split_files for scanned in found)))
        for entry in entries:
            left_out.add(entry)
        left_out.check(self.files, max_left_out)
        left_out.report()
        self._num_documents = [len(scanned.keys) for scanned in found]
        corpus = Corpus(
            list(self.files),
            left_out,
            self.options,
            np.concatenate([scanned.keys for scanned in found]),
            np.concatenate([scanned.sizes for scanned in found]),
        )
        return [digest for scanned in found for digest in scanned.digests], corpus

    def encode(
        self,
        folder: Path,
        inputs: DataInputs,
        tokenizer: Tokenizer,
        corpus: Corpus,
        is_validation: np.ndarray,
    ) -> tuple[SplitSummary, SplitSummary]:
        """Encode all documents by tasks, and lay their splits one after the other."""
        text = tokenizer.to_str()
        digest = hashlib.sha256(text.encode("utf-8") + is_validation.tobytes()).hexdigest()[:16]
        shards = self.folder / f"encode-{digest}"
        shards.mkdir(exist_ok=True)
        held_out = shards / "held_out.npy"
        np.save(held_out, is_validation)
        starts = [0, *np.cumsum(self._num_documents).tolist()]
        task = EncodeTask(self.groups, starts, self.options, inputs, text, held_out, shards)
        self.engine.run([task], len(self.groups), shards)
        results = [task.load(rank) for rank in range(len(self.groups))]
        self._raise_problem([r if isinstance(r, str) else None for r in results], shards)
        writers = [SplitWriter(folder / split, inputs.vocab_size) for split in SPLITS]
        for rank, result in enumerate(results):
            assert not isinstance(result, str)
            for split, writer, summary, counts in zip(SPLITS, writers, *result, strict=True):
                writer.add_shard(task.result(rank) / split, counts, summary)
        train, validation = (writer.finish() for writer in writers)
        return train, validation

    def _raise_problem(self, problems: Sequence[str | None], folder: Path) -> None:
        """Raise what the first task found, which runs again the next time."""
        for rank, problem in enumerate(problems):
            if problem is not None:
                self.engine.forget(rank, folder)
        first = next((problem for problem in problems if problem is not None), None)
        if first is not None:
            raise UserError(first)


def group_files(files: Sequence[SourceFile], num_groups: int) -> list[list[SourceFile]]:
    """Files one after the other in groups with about as many bytes; none is empty.

    Args:
        files: At least one.
        num_groups: Fewer where there are fewer files.
    """
    num_groups = min(num_groups, len(files))
    total = sum(file.num_bytes for file in files) + len(files)
    groups: list[list[SourceFile]] = [[]]
    before = 0
    for number, file in enumerate(files):
        rest_of_files, rest_of_groups = len(files) - number, num_groups - len(groups)
        is_full = before >= total * len(groups) / num_groups
        if groups[-1] and rest_of_groups and (is_full or rest_of_files <= rest_of_groups):
            groups.append([])
        groups[-1].append(file)
        before += file.num_bytes + 1
    return groups


def _check_bad_rows(entries: Sequence[Skipped], options: ReadOptions) -> None:
    """Refuse more bad rows than may be in all tasks together; a task has seen only its own."""
    bad = [entry for entry in entries if entry.row_of and entry.reason.startswith("bad row")]
    if len(bad) > options.skip_bad_rows:
        first = bad[options.skip_bad_rows]
        raise UserError(
            f"sources have {len(bad)} bad rows, more than the {options.skip_bad_rows} that "
            f"--skip-bad-rows allows; the first beyond them is {first.name}, {first.reason}; "
            f"correct them, or leave them out with --skip-bad-rows {len(bad)} or more"
        )
