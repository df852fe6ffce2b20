"""``trinity-megatron evaluate``: the scores of a checkpoint, on one rank or several."""

if __name__ == "__main__":
    from trinity_megatron.process.rank import enter_rank

    enter_rank()  # before the imports, which take seconds

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from trinity_megatron.data.tokenizer_file import load_transformers_tokenizer
from trinity_megatron.errors import UserError
from trinity_megatron.process.console import make_screen_safe
from trinity_megatron.process.rank import (
    USER_ERROR,
    describe_error,
    is_user_error,
    quiet_megatron,
)

quiet_megatron()  # before anything of Megatron is imported
make_screen_safe()

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host  # noqa: E402
from trinity_megatron.evaluation.evaluate_flags import add_evaluate_flags  # noqa: E402
from trinity_megatron.evaluation.task_choice import (  # noqa: E402
    EvaluationFlags,
    TaskChoice,
    check_folder,
    check_numbers,
    split_lengths,
    split_names,
    use_local_data,
)

# The ranks wait as long as rank 0 reads tasks, or computes a metric.
_PATIENCE = timedelta(days=1)


def run(args: argparse.Namespace) -> int:
    """Evaluate; call it on every rank of an initialised world.

    Returns:
        0.

    Raises:
        UserError: A flag, the checkpoint or a task is at fault.
    """
    use_local_data()
    enter_host()
    _check(args)
    from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
    from trinity_megatron.checkpoint.vocabulary import find_vocab_size, get_vocabulary_rows
    from trinity_megatron.evaluation.generate import find_tokenizer_folder, load_as_saved
    from trinity_megatron.evaluation.shared_model import SharedModel

    source = TorchDistReader(args.load)
    folder = find_tokenizer_folder(args.load, source, args.tokenizer)
    max_length = args.max_length or int(source.args.max_position_embeddings)
    asker = _Asker(args, folder, max_length) if torch.distributed.get_rank() == 0 else None
    model = load_as_saved(
        args.load,
        source,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
    )
    rows = get_vocabulary_rows(source.model_tensors())
    shared = SharedModel(model, find_vocab_size(source.args, folder) or rows)
    if asker is None:
        shared.serve()
    else:
        asker.ask(shared, source)
    return 0


class _Asker:
    """What rank 0 has: the tasks, and where the results go.

    Args:
        args: Flags of the command.
        folder: Of the tokenizer.
        max_length: Longest sequence.

    Raises:
        UserError: A task is at fault.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, max_length: int) -> None:
        lengths = split_lengths(args.niah_lengths, max_length)
        from trinity_megatron.evaluation.harness import load_tasks

        self._args, self._max_length = args, max_length
        self._tokenizer: Any = load_transformers_tokenizer(folder)
        if args.apply_chat_template and not self._tokenizer.chat_template:
            raise UserError(
                f"--apply-chat-template: the tokenizer in {folder} has no chat template. Remedy: "
                "leave it out, or --tokenizer DIR with one that has."
            )
        choice = TaskChoice(split_names(args.tasks), args.data, lengths, self._tokenizer)
        self._tasks = load_tasks(choice, max_length=max_length)

    def ask(self, shared: Any, source: Any) -> None:
        """Evaluate, and say and write what came of it."""
        from trinity_megatron.evaluation import harness
        from trinity_megatron.evaluation.results import add_to_run, find_run

        args = self._args
        flags = EvaluationFlags(
            batch_size=args.batch_size,
            max_length=args.max_length,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            apply_chat_template=args.apply_chat_template,
        )
        results = harness.evaluate(
            shared, self._tokenizer, self._tasks, flags, max_length=self._max_length
        )
        print(harness.format_results(results), flush=True)
        add_to_run(find_run(args.out, args.load), source, results)


def _check(args: argparse.Namespace) -> None:
    check_numbers(
        batch_size=args.batch_size,
        max_length=args.max_length,
        limit=args.limit,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
    )
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num-fewshot {args.num_fewshot} is below 0. Remedy: at least 0.")
    check_folder(args.data)
    world = torch.distributed.get_world_size()
    tensor, expert = args.tensor_model_parallel_size, args.expert_model_parallel_size
    if world % tensor or world % expert:
        raise UserError(
            f"{world} ranks cannot be divided by --tensor-model-parallel-size {tensor} and "
            f"--expert-model-parallel-size {expert}. Remedy: --nproc with a multiple of both."
        )


def main(argv: Sequence[str]) -> int:
    """One rank of the command; started by torchrun or alone."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_evaluate_flags(parser)
    args = parser.parse_args(argv)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        code = run(args)
    except (UserError, OSError) as error:
        if not is_user_error(error):
            raise
        if torch.distributed.get_rank() == 0:
            message = f"trinity-megatron: error: {describe_error(error)}"
            print(message, file=sys.stderr, flush=True)
        return USER_ERROR
    torch.distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
