"""Conversations, chat templates, and what each template writes, spelled out without Jinja."""

import json
import random
from typing import Any

from tokenizers import Tokenizer

from trinity_megatron.data.chat.template import Conversation
from trinity_megatron.data.tokenizer import chatml_template

WITH_GENERATION = """\
{%- if tools %}{{- '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}{% generation %}{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<call>' + call.function.name + (call.function.arguments | tojson) + '</call>' }}
{%- endfor %}{{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
INSTRUCT = """\
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content + '<|endoftext|>' }}
{%- else %}{{- '[' + message.role + '] ' + message.content + '\\n' }}{%- endif %}
{%- endfor %}"""

Parts = list[tuple[str, bool]]


def write_chatml(conversation: Conversation) -> Parts:
    parts: Parts = []
    for message in conversation.messages:
        is_assistant = message["role"] == "assistant"
        parts += [
            (f"<|im_start|>{message['role']}\n", False),
            (f"{message['content']}<|im_end|>", is_assistant),
            ("\n", False),
        ]
    return parts


def write_with_generation(conversation: Conversation) -> Parts:
    parts: Parts = []
    if conversation.tools:
        parts.append((f"<|im_start|>tools\n{json.dumps(conversation.tools)}<|im_end|>\n", False))
    for message in conversation.messages:
        calls = "".join(
            f"<call>{call['function']['name']}{json.dumps(call['function']['arguments'])}</call>"
            for call in message.get("tool_calls", [])
        )
        parts += [
            (f"<|im_start|>{message['role']}\n", False),
            (f"{message['content']}{calls}<|im_end|>", message["role"] == "assistant"),
            ("\n", False),
        ]
    return parts


def write_instruct(conversation: Conversation) -> Parts:
    parts: Parts = []
    for message in conversation.messages:
        if message["role"] == "assistant":
            parts.append((f" {message['content']}<|endoftext|>", True))
        elif message["role"] == "user":
            parts.append((f"[INST] {message['content']} [/INST]", False))
        else:
            parts.append((f"[{message['role']}] {message['content']}\n", False))
    return parts


TEMPLATES = {
    "chatml": (chatml_template(), write_chatml),
    "generation": (WITH_GENERATION, write_with_generation),
    "instruct": (INSTRUCT, write_instruct),
}

_WORDS = (
    "yes no 7 1234567 3.14 naïve Привет 日本語 🙂👩\u200d🚀 é\u0301 def f(x): return \n\n \n \t a  "
    "b ( [/INST] assistant user <call> {} ' \" \\ -"
).split(" ")
_TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": "int", "b": "int"}}}


def make_conversations(count: int, *, with_tools: bool = False) -> list[Conversation]:
    """Conversations of one to six turns with odd texts, some with a system message."""
    draw = random.Random(count)

    def text() -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(0, 12)))

    made = []
    for index in range(count):
        messages: list[dict[str, Any]] = []
        if draw.random() < 0.4:
            messages.append({"role": "system", "content": text()})
        for _ in range(draw.randint(1, 6)):
            messages.append({"role": "user", "content": text()})
            if with_tools and draw.random() < 0.3:
                call = {"function": {"name": "add", "arguments": {"a": draw.randint(0, 99)}}}
                messages.append({"role": "assistant", "content": text(), "tool_calls": [call]})
                messages.append({"role": "tool", "content": str(draw.randint(0, 99))})
            messages.append({"role": "assistant", "content": text()})
        if draw.random() < 0.1:
            messages.append({"role": "user", "content": text()})
        tools = [_TOOL] if with_tools and index % 2 else None
        made.append(Conversation(messages, tools))
    return made


def expected_tokens(tokenizer: Tokenizer, parts: Parts) -> tuple[list[int], list[bool]]:
    """Tokens of a text, and which of them have a character of the assistant."""
    characters = [is_assistant for text, is_assistant in parts for _ in text]
    encoding = tokenizer.encode("".join(text for text, _ in parts), add_special_tokens=False)
    return encoding.ids, [any(characters[start:end]) for start, end in encoding.offsets]
