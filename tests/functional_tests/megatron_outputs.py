"""Loss and greedy continuations of Megatron's model of a checkpoint, on validation text.

python megatron_outputs.py CHECKPOINTS FOLDER_WITH_TOKENIZER OUTPUT
"""

import json
import sys
import sysconfig
from pathlib import Path

import torch

from trinity_megatron.checkpoint.model_io import load_megatron_model
from trinity_megatron.model.generation import generate_tokens

SEQUENCES, LENGTH, PROMPTS, NEW_TOKENS = 16, 64, 5, 64


def read_text(tokenizer_folder: Path) -> torch.Tensor:
    """Tokens of a file that the training has not seen; int64 ``[SEQUENCES, LENGTH + 1]``."""
    from tokenizers import Tokenizer

    text = (Path(sysconfig.get_path("stdlib")) / "zipfile" / "__init__.py").read_text()
    tokens = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).encode(text).ids
    return torch.tensor(tokens[: SEQUENCES * (LENGTH + 1)]).view(SEQUENCES, LENGTH + 1)


@torch.no_grad()
def main() -> None:
    """Load, run and write."""
    checkpoints, folder, output = map(Path, sys.argv[1:])
    model = load_megatron_model(checkpoints).eval()
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = read_text(folder)
    positions = torch.arange(LENGTH).expand(SEQUENCES, -1)
    loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean().item()
    prompts = tokens[:PROMPTS, :20]
    steps = generate_tokens(
        model, prompts.tolist(), max_new_tokens=NEW_TOKENS, vocab_size=vocab_size
    )
    continuations = torch.tensor(list(steps)).T
    torch.save(
        {"tokens": tokens, "loss": loss, "prompts": prompts, "continuations": continuations}, output
    )


if __name__ == "__main__":
    main()
