"""Parts of Trinity Large on the null device: what a micro-batch launches, and keeps.

python -m tests.null_gpu.parts       # a JSON object: for each part, counts, kernels and bytes
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
from trinity_megatron.model.norms import TrinityRMSNorm
from trinity_megatron.model.presets import trinity_preset
from trinity_megatron.model.weight_gradients import add_weight_gradient
from trinity_megatron.telemetry.step_statistics import statistics_of

NUM_TOKENS = 8192


def loss(model: LanguageModule, device: NullDevice, folder: Path) -> dict[str, Any]:
    """Output layer and loss: forward and backward pass, after one that compiles.

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
        losses = loss_of(labels, logits)
        del logits
        (losses * mask).sum().backward()
        counts = device.read()
    gradients = hidden.grad.nbytes + weight.grad.nbytes
    return {
        "counts": counts,
        "kernels": device.kernels(folder / "kernels"),
        "beside": torch.cuda.max_memory_allocated() - before - gradients,
    }


def norm(
    model: LanguageModule, device: NullDevice, folder: Path, heads: int, is_view: bool
) -> dict[str, Any]:
    """A norm of hidden states, or of that many heads: forward and backward pass, the second one.

    Returns:
        ``counts``, ``kernels``, and ``kept``: bytes from the forward to the backward pass, beside
        input and output.
    """
    size = model.config.kv_channels if heads else model.config.hidden_size
    module = TrinityRMSNorm(model.config, size)
    shape = (NUM_TOKENS, 1, *([heads] if heads else []), 2 * size if is_view else size)
    whole = torch.empty(*shape, dtype=torch.bfloat16, device="cuda").requires_grad_()
    y = None
    for _ in range(2):
        del y
        module.weight.grad = whole.grad = None
        device.reset()
        before = torch.cuda.memory_allocated()
        y = module(whole[..., :size])
        kept = torch.cuda.memory_allocated() - before - y.nbytes
        y.backward(torch.empty_like(y))
        counts = device.read()
    return {"counts": counts, "kernels": device.kernels(folder / "kernels"), "kept": kept}


def weight_gradient(device: NullDevice, folder: Path) -> dict[str, Any]:
    """Gradient of the matrix of the attention's output, added to its fp32 sum.

    Returns:
        ``counts``, ``kernels``, and ``made``: bytes of the peak.
    """
    inputs, grad = (
        torch.empty(NUM_TOKENS, 3072, dtype=torch.bfloat16, device="cuda") for _ in "xg"
    )
    total = torch.empty(3072, 3072, device="cuda")
    for _ in range(2):
        device.reset()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        add_weight_gradient(inputs, grad, total)
        counts = device.read()
    made = torch.cuda.max_memory_allocated() - before
    return {"counts": counts, "kernels": device.kernels(folder / "kernels"), "made": made}


def main() -> None:
    """The loss in steps that are logged and in others; each kind of norm."""
    config = trinity_preset("large", bf16=True, params_dtype=torch.bfloat16)
    config.lm_head_z_loss_coeff = 1e-6
    with tempfile.TemporaryDirectory() as name:
        folder, device = Path(name), NullDevice()
        with one_rank_world(folder / "store"):
            model = LanguageModule(config)
            results = {}
            for kind in ("plain", "logged"):
                statistics_of(config).is_collecting = kind == "logged"
                results[f"{kind} loss"] = loss(model, device, folder)
            groups = config.num_query_groups
            for part, heads, is_view in (
                ("norm of hidden states", 0, False),
                ("norm of queries", config.num_attention_heads, False),
                ("norm of keys", groups, True),
            ):
                results[part] = norm(model, device, folder, heads, is_view)
            results["weight gradient"] = weight_gradient(device, folder)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
