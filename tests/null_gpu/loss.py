"""Output layer and loss of Trinity Large on the null device: what a micro-batch launches.

python -m tests.null_gpu.loss       # a JSON object: for each kind of step, counts and kernels
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule

from tests.null_gpu.device import NullDevice
from tests.unit_tests.parallel_state import one_rank_world
from trinity_megatron.model.lm_head_loss import LanguageModelLoss
from trinity_megatron.model.presets import trinity_preset
from trinity_megatron.telemetry.step_statistics import statistics_of

NUM_TOKENS = 8192


def step(model: LanguageModule, device: NullDevice, folder: Path) -> dict[str, Any]:
    """Forward and backward pass of one micro-batch, after one that compiles.

    Returns:
        ``counts``, ``kernels``, and ``beside``: bytes of the peak that are neither logits nor
        gradients of weights and hidden states.
    """
    config = model.config
    hidden, weight = (
        torch.empty(rows, config.hidden_size, dtype=torch.bfloat16, device="cuda").requires_grad_()
        for rows in (NUM_TOKENS, config.vocab_size)
    )
    labels = torch.zeros(1, NUM_TOKENS, dtype=torch.int64, device="cuda")
    mask = torch.ones(1, NUM_TOKENS, device="cuda")
    loss_of = LanguageModelLoss(model)
    for _ in range(2):
        weight.grad = hidden.grad = None
        statistics_of(config).clear()
        device.reset()
        logits = (hidden @ weight.T).unsqueeze(1)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss_of.take_loss_mask(None, None, {"loss_mask": mask})
        loss = loss_of(labels, logits)
        del logits
        (loss * mask).sum().backward()
        counts = device.read()
    gradients = hidden.grad.nbytes + weight.grad.nbytes
    return {
        "counts": counts,
        "kernels": device.kernels(folder / "kernels"),
        "beside": torch.cuda.max_memory_allocated() - before - gradients,
    }


def main() -> None:
    """Count for steps that are logged and for others."""
    config = trinity_preset("large", bf16=True, lm_head_z_loss_coeff=1e-6)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with one_rank_world(folder / "store"):
            model = LanguageModule(config)
            results = {}
            for kind in ("plain", "logged"):
                statistics_of(config).is_collecting = kind == "logged"
                results[kind] = step(model, NullDevice(), folder)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
