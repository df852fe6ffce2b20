"""A chat template: conversations become tokens, some of which the assistant says."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trinity_megatron.data.rows import RowError, check_text
from trinity_megatron.data.tokenizer import CHATML_TOKENS, TEMPLATE_NAME, chatml_template
from trinity_megatron.data.tokenizer_file import check_template, load_transformers_tokenizer
from trinity_megatron.errors import UserError

# Stands for the file of our own template on the command line.
CHATML = "chatml"
# transformers looks for the same.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "Probe of a turn"
# What a turn of the assistant may consist of beside its content.
_OF_ASSISTANT = frozenset({"tool_calls", "function_call"})
_GENERATION_REMEDY = (
    "mark what the assistant says with {% generation %} and {% endgeneration %} in a copy of the "
    "template, and name that with --chat-template"
)

# What an expression in a template may raise.
_OF_TEMPLATES = (
    *(TypeError, ValueError, AttributeError, ArithmeticError, LookupError),
    *(RecursionError, MemoryError),
)

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages with their roles, and the tools that the assistant may call.

    Attributes:
        messages: Each with ``role`` and ``content``, and what else the template knows.
        tools: JSON schemas of the functions; None without.
    """

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None


@dataclass(frozen=True)
class EncodedConversation:
    """Tokens of a conversation.

    Attributes:
        tokens: int32 ``[n]``: what ``apply_chat_template`` gives.
        is_assistant: Whether each token is learnt, bool ``[n]``.
        num_bytes: UTF-8 bytes of the messages' contents.
    """

    tokens: np.ndarray
    is_assistant: np.ndarray
    num_bytes: int = 0


class ChatTemplate:
    """A chat template, with the tokenizer that it belongs to.

    The assistant's tokens are those inside of ``{% generation %}``, by transformers.  A template
    without it is rendered up to each turn of the assistant, and with that turn: what the turn
    adds, up to the token that ends it, is the assistant's.  That holds for templates that do not
    change what they wrote before; for others the conversation is refused.

    Args:
        tokenizer: transformers' tokenizer.
        source: The template in Jinja.
        name: Where the template comes from, for messages.

    Raises:
        UserError: The template does not render a conversation of two turns, ends the assistant's
            without a special token, or does not mark that token as the assistant's.
    """

    def __init__(self, tokenizer: Any, source: str, name: str) -> None:
        self.tokenizer, self.source, self.name = tokenizer, source, name
        self._has_generation = bool(_GENERATION.search(source))
        self._special = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self.end_of_turn: int = -1
        self._probe()

    @property
    def end_text(self) -> str:
        """The token that ends a turn, as text."""
        return self._special[self.end_of_turn]

    def prompt(self, conversation: Conversation) -> list[int]:
        """Tokens of a conversation that the assistant is to go on with.

        Raises:
            RowError: The template refuses it, or a message that is not the assistant's contains a
                special token.
        """
        said = [message for message in conversation.messages if message["role"] != "assistant"]
        self._check_texts(said, conversation.tools)
        text = self._render(conversation.messages, conversation.tools, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """Tokens of a conversation, and which of them the assistant says.

        Raises:
            RowError: The template refuses it, or does not show which part is the assistant's, or
                a message contains a special token.
        """
        self._check_texts(conversation.messages, conversation.tools)
        self._check_tools(conversation)
        self._check_fields(conversation)
        encoded = (
            self._encode_by_marks(conversation)
            if self._has_generation
            else self._encode_by_prefixes(conversation)
        )
        if not encoded.is_assistant.any():
            raise RowError(f"the chat template of {self.name} marks no token as the assistant's")
        texts = (message["content"] for message in conversation.messages)
        return replace(encoded, num_bytes=sum(len(text.encode("utf-8")) for text in texts))

    def _encode_by_marks(self, conversation: Conversation) -> EncodedConversation:
        found = self._apply(
            conversation.messages,
            conversation.tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return EncodedConversation(
            np.array(found["input_ids"], np.int32), np.array(found["assistant_masks"], bool)
        )

    def _encode_by_prefixes(self, conversation: Conversation) -> EncodedConversation:
        text, spans = self._find_spans(conversation)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = np.array(found["offset_mapping"], np.int64).reshape(-1, 2).T
        is_assistant = np.zeros(len(starts), bool)
        for start, end in spans:  # as transformers: every token that overlaps
            is_assistant |= (ends > start) & (starts < end)
        return EncodedConversation(np.array(found["input_ids"], np.int32), is_assistant)

    def _find_spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and from where to where the assistant speaks."""
        messages, tools = conversation.messages, conversation.tools
        whole, spans = self._render(messages, tools), []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                raise RowError(
                    "begins with a turn of the assistant, which this template does not mark; "
                    f"{_GENERATION_REMEDY}"
                )
            before = self._render(messages[:index], tools, add_generation_prompt=True)
            after = self._render(messages[: index + 1], tools)
            if not (after.startswith(before) and whole.startswith(after)):
                raise RowError(
                    f"message {index + 1}: the chat template of {self.name} writes what stands "
                    "before it in another way when it follows, so what the assistant says is not "
                    f"known; {_GENERATION_REMEDY}"
                )
            spans.append((len(before), self._end_of_span(after, len(before))))
        return whole, spans

    def _end_of_span(self, text: str, start: int) -> int:
        """The end of a turn: white space behind the token that ends it is the template's."""
        if self.end_of_turn < 0:
            return len(text)
        closing = text.rfind(self.end_text, start)
        end = closing + len(self.end_text)
        return len(text) if closing < 0 or text[end:].strip() else end

    def _check_texts(self, messages: Sequence[Message], tools: Any) -> None:
        """Refuse texts that are not Unicode, or have special tokens, which would be encoded so."""
        places = [(f"message {number}", message) for number, message in enumerate(messages, 1)]
        for place, value in [*places, ("tools", tools)]:
            for text in _texts(value):
                if isinstance(error := check_text(text, place), RowError):
                    raise error
                token = next((token for token in self._special.values() if token in text), None)
                if token is not None:
                    raise RowError(f"{place} contains the special token {token}")

    def _check_fields(self, conversation: Conversation) -> None:
        """Refuse what the assistant says or does in a field that the template leaves out."""
        messages, tools = list(conversation.messages), conversation.tools
        for index, message in enumerate(messages):
            for name in _OF_ASSISTANT.intersection(message):
                whole = self._render(messages, tools)
                less = {key: value for key, value in message.items() if key != name}
                others = [*messages[:index], less, *messages[index + 1 :]]
                if message[name] and self._render(others, tools) == whole:
                    raise RowError(
                        f"message {index + 1} has {name}, which the chat template of {self.name} "
                        "leaves out; name one that writes it with --chat-template, or remove it"
                    )

    def _check_tools(self, conversation: Conversation) -> None:
        messages, tools = conversation.messages, conversation.tools
        if tools and self._render(messages, tools) == self._render(messages, None):
            raise RowError(
                f"has tools, which the chat template of {self.name} leaves out; name one that "
                "writes them with --chat-template"
            )

    def _render(self, messages: Sequence[Message], tools: Any, **options: Any) -> str:
        return self._apply(messages, tools, tokenize=False, **options)

    def _apply(self, messages: Sequence[Message], tools: Any, **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=tools, chat_template=self.source, **options
            )
        except (TemplateError, *_OF_TEMPLATES) as error:
            raise RowError(f"the chat template of {self.name} refuses it: {error}") from error

    def _probe(self) -> None:
        """Find the token that ends a turn of the assistant, and check that it is learnt."""
        messages = [
            {"role": "user", "content": "A question"},
            {"role": "assistant", "content": _PROBE},
        ]
        try:
            text = self._render(messages, None)
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            end = text.rindex(_PROBE) + len(_PROBE)
            after = [
                (place, token)
                for place, (token, (start, _)) in enumerate(
                    zip(found["input_ids"], found["offset_mapping"], strict=True)
                )
                if start >= end and token in self._special
            ]
            if not after:
                raise UserError(
                    f"the chat template of {self.name} ends no turn of the assistant with a "
                    "special token, so a model would not learn to stop. Remedy: --chat-template "
                    f"{CHATML}, if the tokenizer has {' and '.join(CHATML_TOKENS)}, or a file."
                )
            place, self.end_of_turn = after[0]
            is_learnt = self.encode(Conversation(messages)).is_assistant[place]
        except (RowError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"the chat template of {self.name} does not render a question and its answer "
                f"({error}). Remedy: --chat-template with one that does."
            ) from error
        if not is_learnt:
            raise UserError(
                f"the chat template of {self.name} has {self.end_text}, which ends a turn, outside "
                "of {% generation %}, so a model would not learn to stop. Remedy: {% endgeneration "
                "%} behind it in a copy of the template, named with --chat-template."
            )


def load_chat_template(folder: Path, template: str | None = None) -> ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        folder: Of the tokenizer.
        template: A Jinja file to use instead of the tokenizer's own, or ``chatml`` for ours.

    Raises:
        UserError: There is none, or it cannot be used.
    """
    tokenizer: Any = load_transformers_tokenizer(folder)
    if not tokenizer.is_fast:
        raise UserError(f"{folder} has no tokenizer.json of the library tokenizers. Remedy: one.")
    if template == CHATML:
        _check_chatml_tokens(tokenizer, folder)
        return ChatTemplate(tokenizer, chatml_template(), CHATML)
    if template is not None:
        try:
            source = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--chat-template {template} cannot be read ({error}). Remedy: a Jinja file, or "
                f"{CHATML}."
            ) from error
        check_template(tokenizer, source, template)
        return ChatTemplate(tokenizer, source, template)
    if not isinstance(tokenizer.chat_template, str):
        raise UserError(
            f"the tokenizer {folder} has no chat template ({TEMPLATE_NAME}). Remedy: "
            f"--chat-template FILE, or --chat-template {CHATML} if it has "
            f"{' and '.join(CHATML_TOKENS)}."
        )
    return ChatTemplate(tokenizer, tokenizer.chat_template, str(folder))


def _check_chatml_tokens(tokenizer: Any, folder: Path) -> None:
    known = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if missing := [token for token in CHATML_TOKENS if token not in known]:
        raise UserError(
            f"--chat-template {CHATML}: the tokenizer {folder} has no special token "
            f"{' and no '.join(missing)}; those that prepare-data trains now have them. "
            "Remedy: --chat-template FILE with a template of the tokens that it has."
        )


def _texts(value: Any) -> list[str]:
    """All strings inside of a message."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []
