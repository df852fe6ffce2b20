"""Hooks into Megatron's training loop, and the one place that calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from megatron.training import get_args

from trinity_megatron.upstream.registry import replaced


class Callback:
    """What the training loop calls; every hook does nothing by default.

    ``..._start`` hooks run in the order of the callbacks, ``..._end`` hooks in reverse.  All ranks
    call all hooks.
    """

    def on_train_start(self) -> None:
        """Run before the training loop; the checkpoint is loaded."""

    def on_train_end(self) -> None:
        """Run after the training loop and its last save, unless an exception has ended it."""

    def on_train_step_start(self, iteration: int, model: Any, optimizer: Any) -> None:
        """Run before a step.

        Args:
            iteration: Number of the step, from 1.
            model: Chunks of the model.
            optimizer: Megatron's optimizer.
        """

    def on_train_step_end(self, iteration: int, model: Any, optimizer: Any, result: Any) -> None:
        """Run after a step, including one that was skipped.

        Args:
            iteration: Number of the step, from 1.
            model: Chunks of the model.
            optimizer: Megatron's optimizer.
            result: What Megatron's ``train_step`` has returned.
        """

    def should_save(self, iteration: int, *, non_persistent: bool) -> bool:
        """Whether a checkpoint of this step is needed and possible; all ranks agree."""
        return True

    def on_checkpoint_save_start(
        self, iteration: int, model: Any, optimizer: Any, *, non_persistent: bool
    ) -> None:
        """Run before a checkpoint is saved.

        Args:
            iteration: The last completed step.
            model: Chunks of the model.
            optimizer: Megatron's optimizer.
            non_persistent: Whether it is a non-persistent checkpoint.
        """

    def on_checkpoint_save_end(self, iteration: int) -> None:
        """Run after a save; an asynchronous one has only begun."""

    def on_checkpoint_finalize_end(self) -> None:
        """Run after each look at the asynchronous saves, whether or not one has ended."""

    def on_checkpoint_error(self, error: BaseException) -> bool:
        """Run where a save has failed; may raise a better error.

        Returns:
            Whether the training goes on without that save; all ranks agree.
        """
        return False

    def on_evaluation_start(self) -> None:
        """Run before an evaluation on the validation or test set."""

    def on_evaluation_end(self) -> None:
        """Run after an evaluation whose losses are logged."""


@contextmanager
def callbacks_in_training_loop(callbacks: Sequence[Callback]) -> Iterator[None]:
    """Let Megatron's training loop call the callbacks while the block runs.

    Args:
        callbacks: In the order of their ``..._start`` hooks.
    """
    loop = "megatron.training.training"
    with ExitStack() as stack:
        for name, make in (
            ("train", _around_train),
            ("train_step", _around_step),
            ("save_checkpoint", _around_save),
            ("maybe_finalize_async_save", _around_finalize),
            ("evaluate_and_print_results", _around_evaluation),
        ):
            stack.enter_context(replaced(f"{loop}:{name}", make(callbacks)))
        yield


type _Function = Callable[..., Any]
type _Make = Callable[[_Function], _Function]


def _around_train(callbacks: Sequence[Callback]) -> _Make:
    def make(train: _Function) -> _Function:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for callback in callbacks:
                callback.on_train_start()
            result = train(*args, **kwargs)
            for callback in reversed(callbacks):
                callback.on_train_end()
            return result

        return wrapper

    return make


def _around_step(callbacks: Sequence[Callback]) -> _Make:
    def make(train_step: _Function) -> _Function:
        def wrapper(step: Any, data: Any, model: Any, optimizer: Any, *args: Any, **kw: Any) -> Any:
            iteration = get_args().curr_iteration + 1
            for callback in callbacks:
                callback.on_train_step_start(iteration, model, optimizer)
            result = train_step(step, data, model, optimizer, *args, **kw)
            for callback in reversed(callbacks):
                callback.on_train_step_end(iteration, model, optimizer, result)
            return result

        return wrapper

    return make


def _around_save(callbacks: Sequence[Callback]) -> _Make:
    def make(save: _Function) -> _Function:
        def wrapper(iteration: int, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            non_persistent = kwargs.get("non_persistent_ckpt", False)
            if not all(
                callback.should_save(iteration, non_persistent=non_persistent)
                for callback in callbacks
            ):
                return None
            for callback in callbacks:
                callback.on_checkpoint_save_start(
                    iteration, model, optimizer, non_persistent=non_persistent
                )
            try:
                result = save(iteration, model, optimizer, *args, **kwargs)
            except BaseException as error:  # torch's error of a save is no Exception
                if _goes_on(callbacks, error):
                    return None
                raise
            for callback in reversed(callbacks):
                callback.on_checkpoint_save_end(iteration)
            return result

        return wrapper

    return make


def _around_finalize(callbacks: Sequence[Callback]) -> _Make:
    def make(finalize: _Function) -> _Function:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            while True:  # several saves may have ended, and one of them failed
                try:
                    result = finalize(*args, **kwargs)
                    break
                except BaseException as error:
                    if not _goes_on(callbacks, error):
                        raise
            for callback in reversed(callbacks):
                callback.on_checkpoint_finalize_end()
            return result

        return wrapper

    return make


def _around_evaluation(callbacks: Sequence[Callback]) -> _Make:
    def make(evaluate: _Function) -> _Function:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for callback in callbacks:
                callback.on_evaluation_start()
            result = evaluate(*args, **kwargs)
            for callback in reversed(callbacks):
                callback.on_evaluation_end()
            return result

        return wrapper

    return make


def _goes_on(callbacks: Sequence[Callback], error: BaseException) -> bool:
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return False
    return any([callback.on_checkpoint_error(error) for callback in callbacks])
