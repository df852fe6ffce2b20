"""Prepare what a needle study reads: tokenizer, corpora, mixtures, questions and short texts."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from haystacks import all_words, cut_texts, make_questions, read_texts, write_documents
from results import GROUPS, LONG_LENGTH, SHORT_LENGTH, SIZES_NAME, task_name

from trinity_megatron.data.tokenizer import save_tokenizer, train_tokenizer

VOCAB_SIZE, VALIDATION_FRACTION = 2560, 0.02
# Every so many-th text is held out, cut into pieces that fit into a short sequence.
HELD_OUT, NUM_SHORT_TEXTS = 20, 100
# Share of the tokens that are of documents with needles; the rest is text.
NEEDLE_SHARE = 0.8
_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 12, do_sample: false}}
filter_list:
  - name: number
    filter:
      - {{function: regex, regex_pattern: '(\\d+)'}}
      - {{function: take_first}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
_SHORT_MIXTURE = """\
corpora:
  text: {{path: text}}
  needles: {{path: needles_{length}}}
phases: [{{weights: {{text: {text:g}, needles: {needles:g}}}}}]
order: shuffled
"""
# As the report extends a context (3.5): long documents more often than short ones.
_LONG_MIXTURE = """\
corpora:
  text: {{path: text, length_bias: {bias}}}
  needles: {{path: needles_{length}, length_bias: {bias}}}
phases: [{{weights: {{text: {text:g}, needles: {needles:g}}}}}]
order: rsdb
rsdb: {{documents: 64}}
"""


def prepare_corpora(
    out: Path,
    *,
    num_documents: tuple[int, int],
    num_questions: int,
    environment: Mapping[str, str],
) -> None:
    """Write ``data`` and ``questions``, unless they are there.

    Args:
        out: Folder of the study.
        num_documents: With needles, short and long ones.
        num_questions: For each of the distances.
        environment: Of the commands that prepare data.
    """
    data, questions = out / "data", out / "questions"
    if (questions / SIZES_NAME).is_file():
        return
    num_short, num_long = num_documents
    texts = read_texts()
    training = [text for number, text in enumerate(texts) if number % HELD_OUT]
    # The words of the needles several times, so that each of them gets a token.
    tokenizer = train_tokenizer([*[all_words()] * 4, *training[::4]], vocab_size=VOCAB_SIZE)
    save_tokenizer(tokenizer, data / "tokenizer")

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    corpora = {
        "text": training,
        # Documents that are as long as a sequence with their end, so that none is cut.
        f"needles_{SHORT_LENGTH}": write_documents(
            num_short, lambda _: SHORT_LENGTH - 1, count_tokens, seed=1
        ),
        f"needles_{LONG_LENGTH}": write_documents(
            num_long, _draw_long_length, count_tokens, seed=2
        ),
    }
    for name, documents in corpora.items():
        _prepare(data / name, documents, data / "tokenizer", environment)
    _write_mixtures(data)
    _write_questions(questions, texts[::HELD_OUT], count_tokens, num_questions)


def _draw_long_length(choice: random.Random) -> int:
    """As many documents between 512 and 1024 tokens as between 2048 and 4096."""
    return round(SHORT_LENGTH * (LONG_LENGTH / SHORT_LENGTH) ** choice.random())


def _prepare(
    folder: Path, documents: Iterable[str], tokenizer: Path, environment: Mapping[str, str]
) -> None:
    if (folder / "manifest.json").is_file():
        return
    source = folder.with_suffix(".jsonl")
    _write_rows(source, ({"text": text} for text in documents))
    command = [sys.executable, "-m", "trinity_megatron.cli", "prepare-data", "--out", str(folder)]
    command += ["--source", str(source), "--tokenizer", str(tokenizer)]
    command += ["--validation-fraction", str(VALIDATION_FRACTION)]
    subprocess.run(command, env=dict(environment), check=True)


def _write_mixtures(data: Path) -> None:
    shares = {"text": 1 - NEEDLE_SHARE, "needles": NEEDLE_SHARE}
    bias = f"{{tokens: {LONG_LENGTH}}}"
    short = _SHORT_MIXTURE.format(length=SHORT_LENGTH, **shares)
    (data / "short.yaml").write_text(short)
    (data / "long.yaml").write_text(_LONG_MIXTURE.format(length=LONG_LENGTH, bias=bias, **shares))


def _write_questions(
    folder: Path, held_out: Iterable[str], count_tokens: Callable[[str], int], number: int
) -> None:
    """A task of the harness for each distance, and the short texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for before, longest in zip((0, *GROUPS), GROUPS, strict=False):
        name = task_name(longest)
        rows = make_questions(longest, count_tokens, number=number, nearest=before)
        _write_rows(folder / f"{name}.jsonl", rows)
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name))
    # With the end of a document before it.
    texts = cut_texts(held_out, SHORT_LENGTH - 2, count_tokens, NUM_SHORT_TEXTS)
    (folder / "perplexity").mkdir(exist_ok=True)
    _write_rows(folder / "perplexity" / "text.jsonl", ({"text": text} for text in texts))
    sizes = {
        "num_bytes": sum(len(text.encode()) for text in texts),
        "num_tokens": sum(map(count_tokens, texts)),
    }
    (folder / SIZES_NAME).write_text(json.dumps(sizes) + "\n")


def _write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
