"""Token ids to compare models on: of a file, of prepared data, or random."""

from pathlib import Path

import numpy as np
import torch

from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.json_file import read_json

BATCH_SIZE = 2


def read_tokens(path: Path, vocab_size: int) -> torch.Tensor:
    """Token ids of a file: ``.npy``, ``.json`` (one list, or one per sequence) or plain numbers.

    Returns:
        int64 ``[b, s]``.

    Raises:
        UserError: It holds no token ids, or some beyond the vocabulary.
    """
    try:
        if path.suffix == ".npy":
            # Mapped: what its head says of the size is compared with the file.
            values = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(values, np.ndarray):
                raise ValueError("an archive of arrays")
        elif path.suffix == ".json":
            values = np.array(read_json(path))
        else:
            values = np.array(path.read_text().replace(",", " ").split(), dtype=np.int64)
        if values.ndim > 2 or not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"an array of {values.ndim} dimensions of {values.dtype}")
        tokens = torch.from_numpy(np.atleast_2d(values).astype(np.int64))
    except FileNotFoundError as error:
        raise UserError(f"--tokens {path} is not there. Remedy: name a file.") from error
    except (ValueError, TypeError, OverflowError, EOFError) as error:
        raise UserError(
            f"--tokens {path} holds no rows of token ids of the same length ({error}). Remedy: a "
            ".npy or .json file with [sequences, length] ids, or plain numbers."
        ) from error
    if not tokens.numel() or tokens.min() < 0 or tokens.max() >= vocab_size:
        raise UserError(f"--tokens {path}: ids must be within 0..{vocab_size - 1}.")
    return tokens


def read_validation(data: Path, seq_length: int, num_sequences: int) -> torch.Tensor:
    """The first tokens of the validation split of prepared data, document after document.

    Args:
        data: What ``prepare-data --out`` was.
        seq_length: Length of a sequence.
        num_sequences: At most so many.

    Returns:
        int64 ``[b, s]``.

    Raises:
        UserError: The folder holds no prepared data, or its split is shorter than a sequence.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from trinity_megatron.data.manifest import load_manifest

    prefix = load_manifest(data).validation_prefix
    wanted, parts, found = seq_length * num_sequences, [], 0
    for document in IndexedDataset(str(prefix)):
        parts.append(np.asarray(document, dtype=np.int64))
        found += len(document)
        if found >= wanted:
            break
    rows = min(found // seq_length, num_sequences)
    if not rows:
        raise UserError(
            f"--data {data}: its validation split has {found} tokens, fewer than --seq-length "
            f"{seq_length}. Remedy: a shorter --seq-length, or --tokens FILE."
        )
    stream = np.concatenate(parts)[: rows * seq_length]
    return torch.from_numpy(stream).view(rows, seq_length)


def random_tokens(vocab_size: int, seq_length: int) -> torch.Tensor:
    """A batch of random tokens, always the same; int64 ``[b, s]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (BATCH_SIZE, seq_length), generator=generator)
