"""Reading conversations from JSON, parquet and Arrow files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trinity_megatron.data import rows, tables
from trinity_megatron.data.chat.template import Conversation, EncodedConversation
from trinity_megatron.data.corpus import ReadOptions, Skipped, SourceFile, describe_unread
from trinity_megatron.data.rows import RowError
from trinity_megatron.data.sources import naming
from trinity_megatron.data.streams import open_stream, read_lines
from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.json_file import parse_json

MESSAGES_FIELD, _TOOLS_FIELD = "messages", "tools"


def read_conversations(
    files: Sequence[SourceFile],
    options: ReadOptions,
    encode: Callable[[Conversation], EncodedConversation],
) -> Iterator[EncodedConversation | Skipped]:
    """Read and encode the conversations of all files in order.

    Args:
        files: The source files.
        options: ``text_key`` names the field of the messages; ``skip_bad_rows`` rows may be bad.
        encode: Raises :class:`RowError` for a conversation that cannot be used.

    Yields:
        An encoded conversation, or an entry for a file or row that has none.

    Raises:
        UserError: A file has no rows or is damaged, or more rows are bad than may be.
    """
    num_bad = 0
    for file in files:
        if file.format.kind == "unread":
            yield describe_unread(file)
            continue
        with naming(file.path):
            for where, number, row in _read_rows(file, options.text_key):
                try:
                    if isinstance(row, RowError):
                        raise row
                    yield encode(parse_conversation(row, options.text_key))
                except RowError as error:
                    num_bad += 1
                    if num_bad > options.skip_bad_rows:
                        raise UserError(_bad_row(file, where, error, options)) from error
                    yield Skipped(f"{file.name}:{number}", f"bad row: {error}", file.name)


def parse_conversation(row: Any, key: str = MESSAGES_FIELD) -> Conversation:
    """The conversation of a row.

    Args:
        row: Has the messages under ``key`` and may have ``tools``, each as a list or as its JSON.
        key: Name of the field; dots lead into objects.

    Raises:
        RowError: It has no messages with role and content, or none of the assistant.
    """
    found, messages = rows.find_key(row, key)
    if not found or not isinstance(row, Mapping):
        has = rows.list_keys(row) if isinstance(row, Mapping) else type(row).__name__
        raise RowError(f"no field {key!r}, only {has}; name that of the messages with --text-key")
    messages = _parse_list(messages, key)
    if not messages:
        raise RowError(f"{key!r} has no messages")
    checked = [_check_message(message, index + 1) for index, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message in checked):
        raise RowError("no message of the assistant")
    return Conversation(checked, _parse_list(row.get(_TOOLS_FIELD), _TOOLS_FIELD) or None)


def _parse_list(value: Any, key: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = parse_json(value.encode("utf-8"))
        except ValueError as error:
            raise RowError(f"{key!r} is a string that is not JSON ({error})") from error
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError(f"{key!r} is {type(value).__name__}, not a list")
    return value


def _check_message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        has = rows.list_keys(message) if isinstance(message, Mapping) else type(message).__name__
        raise RowError(f"message {number} has no role, only {has}")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise RowError(f"message {number}: content is {type(content).__name__}, not a string")
    # Where it calls a tool it may say nothing, which templates write as an empty text.
    kept = {name: value for name, value in message.items() if value is not None}
    return {**kept, "content": content or ""}


def _read_rows(file: SourceFile, key: str) -> Iterator[tuple[str, int, Any]]:
    """Rows as they are: where, number, and the row or what is wrong with it."""
    kind = file.format.kind
    if kind in ("parquet", "arrow_file", "arrow_stream"):
        columns = (key.partition(".")[0], _TOOLS_FIELD)
        for number, row in enumerate(tables.read_rows(kind, file.path, columns), start=1):
            yield f"row {number}", number, row
        return
    if kind not in ("json_lines", "json_values"):
        raise UserError(
            f"source {file.path} has no rows of conversations"
            f"{file.format.reason and f', but is {file.format.reason}'}; name JSON lines, JSON "
            f"arrays, parquet or Arrow files with a field {key!r}, or another field with --text-key"
        )
    with open_stream(file.path, file.format.layers, file.format.encoding) as stream:
        if kind == "json_values":
            for number, row in enumerate(rows.JsonValues(stream), start=1):
                yield f"row {number}", number, row
            return
        for number, line in enumerate(read_lines(stream), start=1):
            if line.strip():
                yield f"line {number}", number, _parse_line(line)


def _parse_line(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        return RowError(f"not a JSON row in UTF-8 ({error})")


def _bad_row(file: SourceFile, where: str, error: RowError, options: ReadOptions) -> str:
    limit = options.skip_bad_rows
    skipped = f" beyond the {limit} that --skip-bad-rows allows" if limit else ""
    return (
        f"source {file.path}, {where}: {error}; correct this row{skipped}, or leave bad rows out "
        f"with --skip-bad-rows {limit + 1} or more"
    )
