"""lm-evaluation-harness over a Megatron model; the only module that imports it.

Tasks, requests, batches, metrics and their errors are the harness's own; ours is what its model
class for transformers calls a forward pass and a generation.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from trinity_megatron.errors import UserError
from trinity_megatron.evaluation.shared_model import SharedModel
from trinity_megatron.evaluation.task_choice import (
    REMEDY,
    EvaluationFlags,
    TaskChoice,
    use_local_data,
)
from trinity_megatron.evaluation.task_files import plain_task_files
from trinity_megatron.model.generation import Sampling

use_local_data()  # before the hub's packages are imported

try:
    import lm_eval
except ImportError as error:
    raise UserError(
        f"Evaluating needs the package lm-eval, which cannot be imported ({error}). Remedy: "
        f"{REMEDY}."
    ) from error

from datasets import Dataset, DatasetDict  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import handle_non_serializable, make_table  # noqa: E402
from transformers import AfmoeConfig  # noqa: E402

# How a generation may be drawn; anything else in a task's generation_kwargs is refused.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN_OPTIONS = ("until", *_LENGTHS, "do_sample", "temperature", "top_p")


class MegatronLM(HFLM):
    """The harness's model class for transformers, over Megatron's model.

    Args:
        shared: The model.
        tokenizer: transformers' tokenizer.
        batch_size: Rows of a forward pass.
        max_length: Most tokens of a row.
    """

    def __init__(
        self, shared: SharedModel, tokenizer: Any, *, batch_size: int, max_length: int
    ) -> None:
        self._shared, self._num_drawn = shared, 0
        config = AfmoeConfig(vocab_size=shared.vocab_size, max_position_embeddings=max_length)
        with _quiet_harness():
            super().__init__(
                # What the harness reads of a model, none of whose weights it touches.
                SimpleNamespace(config=config, device=shared.device, dtype=shared.dtype),
                backend="causal",
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                softmax_dtype=torch.float32,
            )

    def _model_call(
        self,
        inps: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits fp32 ``[b, s, vocabulary size]`` of tokens int64 ``[b, s]``."""
        assert attn_mask is None and labels is None, "of encoder-decoder models"
        return self._shared.logits(inps)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        """Continue prompts until each has a text of ``stop``.

        Args:
            context: int64 ``[b, n]``, padded on the left.
            max_length: Of prompt and continuation.
            stop: Texts that end a continuation.
            **options: ``attention_mask`` of the prompts, and generation_kwargs of the task.

        Returns:
            int64 ``[b, at most max_length]``, padded on the right with the end of text.
        """
        mask = options.pop("attention_mask").bool()
        prompts = [row[keep].tolist() for row, keep in zip(context, mask, strict=True)]
        steps = self._shared.generate(
            prompts,
            max_new_tokens=max_length - context.shape[1],
            stop=[self.eot_token_id],
            sampling=self._sampling(options, len(prompts)),
        )
        made: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        back = 2 + max(len(self.tok_encode(text, add_special_tokens=False)) for text in stop)
        for step in steps:
            for row in [row for row in open_rows if step[row] is not None]:
                made[row].append(step[row])  # type: ignore[arg-type]
                end = self.tokenizer.decode(made[row][-back:])
                if any(text in end for text in stop if text):
                    open_rows.discard(row)
            if not open_rows:
                break
        longest = max(map(len, made))
        padded = [row + [self.eot_token_id] * (longest - len(row)) for row in made]
        return torch.cat([context, torch.tensor(padded, device=context.device)], dim=1)

    def _sampling(self, options: dict[str, Any], num_rows: int) -> Sampling:
        if not options.get("do_sample"):
            return Sampling()
        first, self._num_drawn = self._num_drawn, self._num_drawn + num_rows
        temperature, top_p = options.get("temperature"), options.get("top_p")
        return Sampling(
            1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p, first
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model."""
        return {"model_dtype": str(self._shared.dtype)}


class _LoadedTasks(TaskManager):
    """Tasks that are loaded once; the harness asks for them in each evaluation."""

    def __init__(self, choice: TaskChoice, max_length: int) -> None:
        with _quiet_harness(), plain_task_files():
            super().__init__(include_path=choice.data and str(choice.data.absolute()))
        self._loaded: Any = None
        self.specs: list[Any] = list(self._specs(choice))
        with contextlib.chdir(choice.data or "."), _quiet_harness(), plain_task_files():
            built = [self._build(spec) for spec in self.specs]
            self._loaded = super().load([task for one in built for task in one])
        for name, task in self._loaded["tasks"].items():
            _check_task(name, task, max_length)

    def load(self, task_list: Any) -> Any:
        """What was loaded."""
        return self._loaded

    def _specs(self, choice: TaskChoice) -> Iterator[Any]:
        for name in choice.names:
            own = choice.own_tasks(name, _as_dataset)
            if own is not None:
                yield from own
                continue
            known = self.match_tasks([name])
            if not known:
                where = f" or --data {choice.data}" if choice.data else ""
                raise UserError(
                    f"--tasks {name} is not a task of lm-eval {lm_eval.__version__}{where}. "
                    "Remedy: lm_eval ls tasks lists its own; a YAML file of yours in --data DIR."
                )
            yield from known

    def _build(self, spec: Any) -> list[Any]:
        name = spec if isinstance(spec, str) else spec["task"]
        try:
            built = self._load_spec(spec)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(
                f"--tasks {name}: its data cannot be read here ({reason}). Nothing is downloaded. "
                "Remedy: the data below --data DIR under the name that the task's dataset_path or "
                "data_files has, or in the cache of Hugging Face (HF_HOME); or HF_HUB_OFFLINE=0 "
                "where there is a network."
            ) from error
        return built if isinstance(built, list) else [built]


def load_tasks(choice: TaskChoice, *, max_length: int) -> _LoadedTasks:
    """Load tasks and their data.

    Args:
        choice: Which.
        max_length: Most tokens of a row.

    Raises:
        UserError: A task is not known, or cannot be evaluated here, or its data are not on this
            machine.
    """
    return _LoadedTasks(choice, max_length)


def _check_task(name: str, task: Any, max_length: int) -> None:
    """Refuse a task that would fail when the model is loaded."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"--tasks {name} runs code that the model writes, which this command does not. "
            "Remedy: export, and lm_eval --confirm_run_unsafe_code in a sandbox."
        )
    if task.OUTPUT_TYPE != "generate_until":
        return
    options = dict(task.config.generation_kwargs or {})
    unknown = sorted(key for key, value in options.items() if key not in _KNOWN_OPTIONS and value)
    if unknown:
        raise UserError(
            f"--tasks {name} has generation_kwargs {unknown[0]}={options[unknown[0]]!r}, which is "
            f"not known here. Remedy: of {', '.join(_KNOWN_OPTIONS)} only, or lm_eval --model hf "
            "on the export."
        )
    wanted = normalize_gen_kwargs(options)["max_gen_toks"]
    if wanted >= max_length:
        raise UserError(
            f"--tasks {name} generates up to {wanted} tokens, and a sequence has at most "
            f"{max_length}. Remedy: --max-length N, or less max_gen_toks in the task's file."
        )


def _as_dataset(rows: list[dict[str, Any]]) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_list(rows)})


def evaluate(
    shared: SharedModel,
    tokenizer: Any,
    tasks: _LoadedTasks,
    flags: EvaluationFlags,
    *,
    max_length: int,
) -> dict[str, Any]:
    """Evaluate; on rank 0, while the others serve.

    Args:
        shared: The model.
        tokenizer: transformers' tokenizer.
        tasks: What is asked.
        flags: How.
        max_length: Most tokens that the model was made for.

    Returns:
        The harness's results, and their ``table``.  The state of every random generator is what
        it was before.
    """
    lm = MegatronLM(
        shared,
        tokenizer,
        batch_size=flags.batch_size,
        max_length=flags.max_length or max_length,
    )
    with _random_states_kept(), plain_task_files(), shared.asking():
        results = lm_eval.simple_evaluate(
            lm,
            tasks=tasks.specs,
            task_manager=tasks,
            num_fewshot=flags.num_fewshot,
            batch_size=flags.batch_size,
            limit=flags.limit,
            apply_chat_template=flags.apply_chat_template,
            log_samples=False,
        )
    assert results is not None, "rank 0 has the results"
    return dict(results)


def to_json(results: dict[str, Any]) -> str:
    """The results as the harness writes them."""
    return json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)


def format_results(results: dict[str, Any]) -> str:
    """The harness's own tables."""
    table = make_table(results)
    return f"{table}\n{make_table(results, 'groups')}" if results.get("groups") else table


@contextlib.contextmanager
def _quiet_harness() -> Iterator[None]:
    """Without advice on flags of the harness that are not ours."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """The harness seeds Python's, numpy's and torch's generators."""
    python, numpy_state = random.getstate(), np.random.get_state()
    devices: Sequence[int] = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
