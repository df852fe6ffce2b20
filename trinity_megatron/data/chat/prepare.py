"""``prepare-data --chat``: conversations as Megatron's indexed data.

A conversation is a document, cut into Megatron's sequences at each change between what the
assistant says and the rest; the mode of a sequence (Megatron's, for several kinds of data) is 1
for the assistant's.  So the loss mask lies in the index, and what identifies the data covers it.
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trinity_megatron.data.chat.conversations import MESSAGES_FIELD, read_conversations
from trinity_megatron.data.chat.template import (
    ChatTemplate,
    EncodedConversation,
    load_chat_template,
)
from trinity_megatron.data.corpus import ReadOptions, Skipped, SourceFile, find_files, hash_file
from trinity_megatron.data.given_tokenizer import GivenTokenizer, copy_tokenizer
from trinity_megatron.data.inputs import READER_VERSION, DataInputs
from trinity_megatron.data.left_out import LeftOut, check_formats
from trinity_megatron.data.manifest import DataManifest, SplitSummary
from trinity_megatron.data.output_folder import (
    SPLITS,
    check_out,
    find_existing,
    locked,
    remove_half_written,
)
from trinity_megatron.data.prepare import build_folder, load_given, sync_files
from trinity_megatron.data.split import select_validation
from trinity_megatron.data.tokenizer import CONFIG_NAME, TEMPLATE_NAME
from trinity_megatron.data.unigram import unigram_entropy
from trinity_megatron.errors import UserError

CONTEXT, ASSISTANT = 0, 1  # modes of a sequence
_TOKEN_DTYPE = np.int32  # of the draft


def prepare_chat(
    out: Path,
    sources: Sequence[Path],
    *,
    tokenizer: Path,
    template: str | None = None,
    validation_fraction: float = 0.05,
    options: ReadOptions | None = None,
    max_left_out: float = 0.1,
) -> DataManifest:
    """Write conversations as Megatron's indexed data.

    Args:
        out: The folder to write, as :func:`trinity_megatron.data.prepare.prepare_data` does.
        sources: JSON, parquet and Arrow files with a field of messages, or folders of these.
        tokenizer: Folder of the tokenizer that the model was trained with.
        template: A Jinja file to use instead of the tokenizer's own template, or ``chatml``.
        validation_fraction: Share of the distinct conversations that goes to validation.
        options: ``text_key`` names the field of the messages.
        max_left_out: Largest share, by bytes, of the files that may be text but cannot be read.

    Raises:
        UserError: A source, the tokenizer or the template cannot be used, a conversation is bad,
            or ``out`` contains other data.
    """
    if not sources:
        raise UserError("--chat needs conversations. Remedy: --source with their files.")
    if not 0 < validation_fraction < 1:
        raise UserError(
            f"validation_fraction {validation_fraction} is not between 0 and 1; 0.05 is usual"
        )
    options = options or ReadOptions(text_key=MESSAGES_FIELD)
    out = Path(out).resolve()
    check_out(out)
    given = load_given(tokenizer, out)
    chat = load_chat_template(given.folder, template)
    files, skipped = find_files(sources, exclude=out, options=options)
    check_formats(skipped, files, max_left_out)
    inputs = _make_inputs(files, options, validation_fraction, given, chat)
    existing = find_existing(out, inputs)
    if existing is not None:
        return existing
    with locked(out):
        existing = find_existing(out, inputs)
        if existing is not None:
            return existing
        remove_half_written(out)

        def write(folder: Path) -> DataManifest:
            left_out = LeftOut(skipped)
            draft = _read(folder / "draft", files, options, chat, left_out)
            left_out.check(files, max_left_out)
            left_out.report()
            train, validation = _write_splits(folder, inputs, draft)
            copy_tokenizer(given, folder / "tokenizer")
            _set_template(folder / "tokenizer", chat)
            return DataManifest(
                path=folder,
                inputs=inputs,
                eod_id=chat.end_of_turn,
                tokenizer_fingerprint=given.fingerprint,
                train=train,
                validation=validation,
                skipped=left_out.entries(),
                files=sync_files(folder),
            )

        return build_folder(out, inputs, files, write)


def _make_inputs(
    files: Sequence[SourceFile],
    options: ReadOptions,
    validation_fraction: float,
    given: GivenTokenizer,
    chat: ChatTemplate,
) -> DataInputs:
    return DataInputs(
        vocab_size=given.vocab_size,
        validation_fraction=float(validation_fraction),
        min_split_tokens=1,
        pre_tokenizer="",
        sources=tuple(sorted((file.name, hash_file(file.path)) for file in files)),
        tokenizer=given.fingerprint,
        eos_token=given.eos_token,
        reader=READER_VERSION,
        text_key=options.text_key,
        skip_bad_rows=options.skip_bad_rows or None,
        chat=hashlib.sha256(chat.source.encode("utf-8")).hexdigest(),
    )


@dataclass(frozen=True)
class _Draft:
    """All conversations, before it is known which are held out.

    Attributes:
        path: File of their tokens, int32, one after another.
        keys: Hash of each conversation, uint64 ``[n]``.
        num_bytes: Of the text of each one, ``[n]``.
        num_runs: Runs of each one, ``[n]``.
        lengths: Tokens of every run.
        modes: ``CONTEXT`` or ``ASSISTANT`` of every run.
    """

    path: Path
    keys: np.ndarray
    num_bytes: np.ndarray
    num_runs: np.ndarray
    lengths: np.ndarray
    modes: np.ndarray


def _read(
    path: Path,
    files: Sequence[SourceFile],
    options: ReadOptions,
    chat: ChatTemplate,
    left_out: LeftOut,
) -> _Draft:
    keys, num_bytes, num_runs = array("Q"), array("q"), array("q")
    lengths, modes = array("q"), array("b")
    with path.open("wb") as stream:
        for entry in read_conversations(files, options, chat.encode):
            if isinstance(entry, Skipped):
                left_out.add(entry)
                continue
            starts = _starts_of_runs(entry)
            keys.append(_hash(entry))
            num_bytes.append(entry.num_bytes)
            num_runs.append(len(starts))
            lengths.extend(np.diff([*starts, len(entry.tokens)]).tolist())
            modes.extend(entry.is_assistant[starts].astype(np.int8).tolist())
            stream.write(entry.tokens.astype(_TOKEN_DTYPE).tobytes())
    columns = (np.array(values, np.int64) for values in (num_bytes, num_runs, lengths, modes))
    return _Draft(path, np.array(keys, np.uint64), *columns)


def _starts_of_runs(conversation: EncodedConversation) -> np.ndarray:
    changes = np.flatnonzero(np.diff(conversation.is_assistant)) + 1
    return np.concatenate([[0], changes])


def _hash(conversation: EncodedConversation) -> int:
    content = conversation.tokens.tobytes() + conversation.is_assistant.tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def _write_splits(
    folder: Path, inputs: DataInputs, draft: _Draft
) -> tuple[SplitSummary, SplitSummary]:
    firsts = np.concatenate([[0], np.cumsum(draft.num_runs)])
    sizes = np.add.reduceat(draft.lengths, firsts[:-1]) if len(draft.keys) else draft.lengths
    is_validation = select_validation(
        draft.keys, sizes, fraction=inputs.validation_fraction, min_bytes=1
    )
    writers = [_ConversationWriter(folder / split, inputs.vocab_size) for split in SPLITS]
    with draft.path.open("rb") as stream:
        for index, held_out in enumerate(is_validation):
            runs = slice(firsts[index], firsts[index + 1])
            tokens = _read_tokens(stream, int(sizes[index]))
            writers[int(held_out)].add(
                tokens, draft.lengths[runs], draft.modes[runs], int(draft.num_bytes[index])
            )
    draft.path.unlink()
    train, validation = (writer.finish() for writer in writers)
    return train, validation


def _read_tokens(stream: BinaryIO, count: int) -> np.ndarray:
    return np.frombuffer(stream.read(count * np.dtype(_TOKEN_DTYPE).itemsize), _TOKEN_DTYPE)


class _ConversationWriter:
    """Writes one split and counts its conversations and tokens."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        # Imported here because it takes seconds: megatron.core imports torch.
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self._prefix, self._dtype = prefix, DType.optimal_dtype(vocab_size)
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=self._dtype, multimodal=True)
        self._counts = np.zeros(vocab_size, np.int64)
        self._conversations = self._tokens = self._bytes = 0

    def add(
        self, tokens: np.ndarray, lengths: np.ndarray, modes: np.ndarray, num_bytes: int
    ) -> None:
        """Append a conversation."""
        self._builder.add_document(tokens.astype(self._dtype), lengths.tolist(), modes.tolist())
        np.add.at(self._counts, tokens[np.repeat(modes, lengths) == ASSISTANT], 1)
        self._conversations += 1
        self._tokens += len(tokens)
        self._bytes += num_bytes

    def finish(self) -> SplitSummary:
        """Close the files and return the summary; its entropy is that of the assistant's tokens."""
        self._builder.finalize(f"{self._prefix}.idx")
        entropy = unigram_entropy(self._counts)
        return SplitSummary(self._conversations, self._tokens, self._bytes, entropy)


def _set_template(folder: Path, chat: ChatTemplate) -> None:
    """Keep the template with the tokenizer, which ends a generation at the end of a turn."""
    (folder / TEMPLATE_NAME).write_text(chat.source, encoding="utf-8")
    # The second file is of earlier transformers, and takes precedence where it is there.
    for name in (CONFIG_NAME, "special_tokens_map.json"):
        path = folder / name
        if path.is_file():
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            config.pop("chat_template", None)  # of earlier transformers, too
            config["eos_token"] = chat.end_text
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            path.write_text(text, encoding="utf-8")
