"""Prepare what a needle study reads: tokenizer, corpora, mixtures, questions and short texts."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from haystacks import (
    all_words,
    cut_texts,
    make_questions,
    read_texts,
    write_document,
    write_documents,
    write_list,
)
from results import GROUPS, LONG_LENGTH, SHORT_LENGTH, SIZES_NAME, task_name
from study import CLI

from trinity_megatron.data.tokenizer import save_tokenizer, train_tokenizer

TEXT_BYTES, VOCAB_SIZE, VALIDATION_FRACTION = 4_000_000, 1024, 0.02
# Every so many-th text is held out, cut into pieces that fit into a short sequence.
HELD_OUT, NUM_SHORT_TEXTS = 20, 100
_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4, do_sample: false}}
filter_list:
  - name: number
    filter:
      - {{function: regex, regex_pattern: '(\\d+)'}}
      - {{function: take_first}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
# By arm.  First to look a key up, then the needles among the noise.
_MIXTURES = {
    "short": """\
corpora:
  text: {{path: text}}
  lists: {{path: lists}}
  needles: {{path: needles_{short}}}
phases:
  - {{until: {first_tokens}, weights: {{text: 0.1, lists: 0.9}}}}
  - {{weights: {{text: 0.3, lists: 0.2, needles: 0.5}}}}
order: shuffled
""",
    "continued": """\
corpora:
  text: {{path: text}}
  needles: {{path: needles_{short}}}
phases: [{{weights: {{text: 0.3, needles: 0.7}}}}]
order: shuffled
""",
    # As the report extends a context (3.5): long documents more often than short ones.
    "extended": """\
corpora:
  text: {{path: text, length_bias: {{tokens: {long}}}}}
  needles: {{path: needles_{long}, length_bias: {{tokens: {long}}}}}
phases: [{{weights: {{text: 0.3, needles: 0.7}}}}]
order: rsdb
rsdb: {{documents: 64}}
""",
}


def prepare_corpora(
    out: Path,
    *,
    num_documents: tuple[int, int, int],
    num_questions: int,
    first_tokens: int,
    environment: Mapping[str, str],
) -> None:
    """Write ``data`` and ``questions``, unless they are there.

    Args:
        out: Folder of the study.
        num_documents: Lists, and documents with needles, short and long.
        num_questions: For each of the distances.
        first_tokens: Of a run, that are lists.
        environment: Of the commands that prepare data.
    """
    data, questions = out / "data", out / "questions"
    if (questions / SIZES_NAME).is_file():
        return
    num_lists, num_short, num_long = num_documents
    texts = read_texts(TEXT_BYTES)
    training = [text for number, text in enumerate(texts) if number % HELD_OUT]
    tokenizer = train_tokenizer([all_words(), *training[::4]], vocab_size=VOCAB_SIZE)
    save_tokenizer(tokenizer, data / "tokenizer")

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    corpora = {
        "text": training,
        "lists": write_documents(
            num_lists, write_list, lambda _: SHORT_LENGTH - 1, count_tokens, seed=3
        ),
        # Documents that are as long as a sequence with their end, so that none is cut.
        f"needles_{SHORT_LENGTH}": write_documents(
            num_short, write_document, lambda _: SHORT_LENGTH - 1, count_tokens, seed=1
        ),
        f"needles_{LONG_LENGTH}": write_documents(
            num_long, write_document, _draw_long_length, count_tokens, seed=2
        ),
    }
    for name, documents in corpora.items():
        _prepare(data / name, documents, data / "tokenizer", environment)
    _write_mixtures(data, first_tokens)
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
    command = [*CLI, "prepare-data", "--out", str(folder)]
    command += ["--source", str(source), "--tokenizer", str(tokenizer)]
    command += ["--validation-fraction", str(VALIDATION_FRACTION)]
    subprocess.run(command, env=dict(environment), check=True)


def _write_mixtures(data: Path, first_tokens: int) -> None:
    for arm, mixture in _MIXTURES.items():
        text = mixture.format(short=SHORT_LENGTH, long=LONG_LENGTH, first_tokens=first_tokens)
        (data / f"{arm}.yaml").write_text(text)


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
