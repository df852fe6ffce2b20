"""``trinity-megatron verify``: Megatron and transformers on the same tokens, layer by layer.

Runs on one rank, or on several in a parallel layout, which holds the model together as training
would.
"""

if __name__ == "__main__":
    from trinity_megatron.process.rank import enter_rank

    enter_rank()  # before the imports, which take seconds

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

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

from trinity_megatron.checkpoint.hf_weights import HFWeights  # noqa: E402
from trinity_megatron.checkpoint.model_io import load_megatron_model  # noqa: E402
from trinity_megatron.checkpoint.transformers_model import transformers_config  # noqa: E402
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host  # noqa: E402
from trinity_megatron.evaluation.tokens import random_tokens, read_tokens  # noqa: E402
from trinity_megatron.evaluation.verify_flags import add_verify_flags  # noqa: E402
from trinity_megatron.model.hf_config import (  # noqa: E402
    read_hf_config,
    trinity_config_from_hf,
)

_DIFFERENT = 1


@dataclass
class Trace:
    """What a model does with a batch.

    Attributes:
        logits: fp32 ``[b, s, vocab]``.
        hidden_states: Output of each layer (0-based), fp32 ``[b, s, d]``.
        routing: Selected experts of each MoE layer, bool ``[b, s, num_experts]``.
    """

    logits: torch.Tensor
    hidden_states: dict[int, torch.Tensor]
    routing: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """How far two traces are apart.

    Attributes:
        max_difference: Largest difference of a logit.
        mean_difference: Mean difference of the logits.
        max_logit: Largest absolute logit.
        drift: Largest difference of a layer's output, relative to its largest number.
        agreement: Share of the routing choices of a layer that are the same.
    """

    max_difference: float
    mean_difference: float
    max_logit: float
    drift: dict[int, float]
    agreement: dict[int, float]

    @property
    def relative_difference(self) -> float:
        """Largest difference of a logit, relative to the largest logit."""
        return self.max_difference / max(self.max_logit, torch.finfo(torch.float32).tiny)


def compare(ours: Trace, theirs: Trace) -> Comparison:
    """Compare two traces of the same tokens; ``theirs`` is the reference."""
    difference = (ours.logits[..., : theirs.logits.shape[-1]] - theirs.logits).abs()
    drift = {
        layer: ((ours.hidden_states[layer] - expected).abs().max() / expected.abs().max()).item()
        for layer, expected in theirs.hidden_states.items()
    }
    agreement = {
        layer: ((ours.routing[layer] & chosen).sum() / chosen.sum()).item()
        for layer, chosen in theirs.routing.items()
    }
    return Comparison(
        difference.max().item(),
        difference.mean().item(),
        theirs.logits.abs().max().item(),
        drift,
        agreement,
    )


def format_comparison(result: Comparison) -> str:
    """The comparison as text."""
    lines = [
        f"logits  max |difference| {result.max_difference:.3e}  mean {result.mean_difference:.3e}"
        f"  max |logit| {result.max_logit:.3e}  relative {result.relative_difference:.3e}",
        "layer  drift of the hidden states  routing agreement",
    ]
    for layer, drift in sorted(result.drift.items()):
        agreement = result.agreement.get(layer)
        routing = "dense" if agreement is None else f"{100 * agreement:.3f}%"
        lines.append(f"{layer:5d}  {drift:26.3e}  {routing:>17}")
    return "\n".join(lines)


@torch.no_grad()
def trace_transformers(model: torch.nn.Module, tokens: torch.Tensor) -> Trace:
    """Run transformers' ``AfmoeForCausalLM``.

    Args:
        model: The model.
        tokens: int64 ``[b, s]``.
    """
    hidden: dict[int, torch.Tensor] = {}
    routing: dict[int, torch.Tensor] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]

        def keep_hidden(module: Any, args: Any, output: Any, index: int = index) -> None:
            hidden[index] = (output[0] if isinstance(output, tuple) else output).float()

        def keep_routing(module: Any, args: Any, output: Any, index: int = index) -> None:
            chosen = torch.zeros(output[0].shape, dtype=torch.bool, device=output[0].device)
            routing[index] = chosen.scatter_(1, output[2], True).view(*tokens.shape, -1)

        handles.append(layer.register_forward_hook(keep_hidden))
        if hasattr(layer.mlp, "router"):
            handles.append(layer.mlp.router.register_forward_hook(keep_routing))
    logits = model(tokens).logits.float()
    for handle in handles:
        handle.remove()
    return Trace(logits, hidden, routing)


@torch.no_grad()
def trace_megatron(model: torch.nn.Module, tokens: torch.Tensor) -> Trace:
    """Run Megatron's model, in whatever layout it lies.  Call it on every rank.

    Args:
        model: The part of the model on this rank.
        tokens: int64 ``[b, s]``, the same on every rank.

    Returns:
        The whole trace, on every rank.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    hidden: dict[int, torch.Tensor] = {}
    routing: dict[int, torch.Tensor] = {}
    batch, length = tokens.shape
    handles = []
    for layer in model.decoder.layers:  # type: ignore[union-attr]

        def keep_hidden(
            module: Any, args: Any, output: Any, index: int = layer.layer_number - 1
        ) -> None:
            hidden[index] = output[0].float().transpose(0, 1).cpu()

        def keep_routing(
            module: Any, args: Any, output: Any, index: int = layer.layer_number - 1
        ) -> None:
            routing[index] = output[1].view(length, batch, -1).transpose(0, 1).cpu()

        handles.append(layer.register_forward_hook(keep_hidden))
        if hasattr(layer.mlp, "router"):
            handles.append(layer.mlp.router.register_forward_hook(keep_routing))
    positions = torch.arange(length, device=tokens.device).expand(batch, -1)
    group = parallel_state.get_pipeline_model_parallel_group()
    passed = torch.empty(
        length,
        batch,
        model.config.hidden_size,  # type: ignore[union-attr, arg-type]
        dtype=torch.float32,
        device=tokens.device,
    )
    logits = None
    for stage, rank in enumerate(torch.distributed.get_process_group_ranks(group)):
        if stage == group.rank():
            model.set_input_tensor(passed)  # type: ignore[operator]
            output = model(tokens, positions, None)
            if parallel_state.is_pipeline_last_stage():
                logits = gather_from_tensor_model_parallel_region(output).float().cpu()
            else:
                passed = output
        if stage < group.size() - 1:
            torch.distributed.broadcast(passed, rank, group=group)
    for handle in handles:
        handle.remove()
    pieces: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(pieces, (logits, hidden, routing), group=group)
    return Trace(
        next(piece[0] for piece in pieces if piece[0] is not None),
        {layer: value for piece in pieces for layer, value in piece[1].items()},
        {layer: value for piece in pieces for layer, value in piece[2].items()},
    )


def run(args: argparse.Namespace) -> int:
    """Compare; call it on every rank of an initialised world.

    Returns:
        0, or 1 beyond the tolerance.
    """
    enter_host()
    fields = read_hf_config(args.hf)
    vocab_size = trinity_config_from_hf(fields).vocab_size
    HFWeights(args.hf)  # whole, before anything is built
    if args.seq_length < 1:
        raise UserError(f"--seq-length {args.seq_length} is below 1. Remedy: give at least 1.")
    sizes = [getattr(args, f"{part}_model_parallel_size") for part in ("tensor", "pipeline")]
    ranks, world = prod(sizes), torch.distributed.get_world_size()
    experts = args.expert_model_parallel_size
    if min(*sizes, experts) < 1 or world % ranks or world % (sizes[1] * experts):
        raise UserError(
            f"{world} ranks cannot be divided into --tensor-model-parallel-size {sizes[0]} x "
            f"--pipeline-model-parallel-size {sizes[1]}, nor the experts over "
            f"--expert-model-parallel-size {experts}. Remedy: --nproc with a multiple of them."
        )
    if args.tokens is not None:
        tokens = read_tokens(args.tokens, vocab_size)
    else:
        tokens = random_tokens(vocab_size, args.seq_length)
    layout = {
        f"{part}_model_parallel_size": getattr(args, f"{part}_model_parallel_size")
        for part in ("tensor", "pipeline", "expert")
    }
    model = load_megatron_model(args.megatron, pipeline_dtype=torch.float32, **layout).eval()
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    ours = trace_megatron(model.to(device), tokens.to(device))
    if torch.distributed.get_rank() != 0:
        return 0
    from transformers import AfmoeForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # The plain loop over experts: the definition, for every size.
    twin = AfmoeForCausalLM.from_pretrained(
        args.hf,
        config=transformers_config(fields),
        dtype=torch.float32,
        experts_implementation="eager",
    ).eval()
    result = compare(ours, trace_transformers(twin, tokens))
    print(format_comparison(result))
    if not result.relative_difference <= args.tolerance:  # NaN is beyond
        print(f"DIFFERENT: beyond the tolerance of {args.tolerance:g} x max |logit|")
        return _DIFFERENT
    print(f"equal within {args.tolerance:g} x max |logit|")
    return 0


def main(argv: Sequence[str]) -> int:
    """One rank of the command; started by torchrun or alone."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_verify_flags(parser)
    args = parser.parse_args(argv)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend)
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
