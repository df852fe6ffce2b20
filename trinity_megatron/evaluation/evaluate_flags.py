"""Flags of ``trinity-megatron evaluate``, for the command and its ranks; imports nothing heavy."""

import argparse
from pathlib import Path

BATCH_SIZE = 8


def add_evaluate_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add = parser.add_argument
    add("--load", required=True, type=Path, metavar="DIR", help="what --save was, or one iteration")
    add(
        "--tasks",
        required=True,
        metavar="NAMES",
        help="of lm-evaluation-harness, with commas between them (patterns too: mmlu_*); niah: "
        "retrieval of one of several needles; perplexity: of each file in DIR/perplexity",
    )
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="task files (YAML) of yours, and data: the task's dataset_path and data_files are "
        "looked up below it",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="run to add the results to (default: the one whose checkpoint it is)",
    )
    add("--tokenizer", type=Path, metavar="DIR", help="tokenizer (default: that of the run)")
    add(
        "--batch-size",
        type=int,
        default=BATCH_SIZE,
        metavar="N",
        help="sequences of a forward pass (%(default)s)",
    )
    add("--max-length", type=int, metavar="N", help="longest sequence (default: the model's)")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (the task's)")
    add("--limit", type=int, metavar="N", help="only the first N documents of each task")
    add("--niah-lengths", metavar="N,N", help="tokens of a question of niah (the longest)")
    add(
        "--apply-chat-template",
        action="store_true",
        help="ask as a user, in the tokenizer's chat template",
    )
    for part in ("tensor", "expert"):
        add(
            f"--{part}-model-parallel-size", type=int, default=1, metavar="N", help="as in training"
        )
