"""The index of the data that Megatron keeps in files: arrays of numbers, nothing else."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy

from trinity_megatron.errors import UserError
from trinity_megatron.upstream.registry import replaced


@contextlib.contextmanager
def plain_index_cache() -> Iterator[None]:
    """Unpickle nothing of ``--data-cache-path`` while the block runs."""
    with (
        replaced("megatron.core.datasets.gpt_dataset:safe_numpy_load", _load_numbers),
        replaced("megatron.core.datasets.blended_dataset:safe_numpy_load", _load_numbers),
    ):
        yield


def _load_numbers(load: Callable[..., Any]) -> Callable[..., Any]:
    """``numpy.load`` that refuses a file of objects."""

    def load_numbers(path: str, **kwargs: Any) -> Any:
        try:
            return numpy.load(path, **{**kwargs, "allow_pickle": False})
        except (ValueError, EOFError) as error:
            raise UserError(
                f"{path}, an index of the data, is damaged or holds no array of numbers ({error}). "
                "Remedy: delete the folder it lies in; the index is made again."
            ) from error

    return load_numbers
