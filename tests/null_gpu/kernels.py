"""Launch every Triton kernel as a GPU run does, for each GPU: what Triton compiles stays behind.

python -m tests.null_gpu.kernels 90 100 103       # compute capabilities; TRITON_CACHE_DIR is filled
"""

import os
import sys
from multiprocessing import get_context

import torch
import torch._inductor.compile_fx  # before the fork

from tests.functional_tests.launch import TAKES_ALL
from trinity_megatron.model import logit_kernels
from trinity_megatron.model.attention import flex
from trinity_megatron.optimizer import syrk

BF16, FP32 = torch.bfloat16, torch.float32
# Trinity Large; no step of a sequence is longer.
SEQ_LENGTH, WINDOW, HEADS, GROUPS, HEAD = 8192, 4096, 48, 8, 128
VOCAB_SIZE, EXPERT = 200192, (2, 3072, 3072)
EXPERTS, TOPK = 256, 4


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def launch_syrk() -> None:
    """Newton-Schulz in bf16; every candidate if everything is asked for."""
    for dtype, tilings in syrk.TILINGS.items():
        matrices = empty(*EXPERT, dtype=dtype)
        for tiling in tilings if TAKES_ALL else tilings[: dtype == BF16]:
            syrk.symmetric_product(matrices, tiling=tiling)
            syrk.symmetric_square(matrices, alpha=2.0, beta=-4.0, tiling=tiling)


def launch_loss() -> None:
    """Statistics and mask as in a logged step; without, and fp32 logits, if everything is."""
    target = torch.zeros(4, dtype=torch.int64, device="cuda")
    for dtype in (BF16, FP32) if TAKES_ALL else (BF16,):
        rows = empty(4, VOCAB_SIZE, dtype=dtype)
        for with_sum in (True, False) if TAKES_ALL else (True,):
            maximum, norm, predicted, total = logit_kernels.reduce_rows(
                rows, target, 0, with_sum=with_sum
            )
            mask = predicted if with_sum else None
            logit_kernels.summarize_rows(norm, maximum, total, mask, VOCAB_SIZE)
        logit_kernels.write_gradient(
            rows,
            rows,
            target,
            0,
            maximum=maximum,
            denominator=norm,
            grad_loss=norm,
            grad_logsumexp=norm,
        )


def launch_attention() -> None:
    """FlexAttention, there and back; the heads of ``tiny``, too, if everything is asked for."""
    for head in (HEAD, 32) if TAKES_ALL else (HEAD,):
        query, key, value = (
            empty(SEQ_LENGTH, 1, heads, head, dtype=BF16).requires_grad_()
            for heads in (HEADS, GROUPS, GROUPS)
        )
        ranges = flex.key_ranges([(0, SEQ_LENGTH, 0)], window=WINDOW, device=query.device)
        mask = flex.range_block_mask(ranges, SEQ_LENGTH)
        assert flex.has_fused_attention(query)
        flex.fused_attention(query, key, value, mask, scale=head**-0.5).sum().backward()


def launch_compiled() -> None:
    """What torch compiles of ours and of Megatron's beside attention, there and back."""
    # Not before the fork: Megatron asks for the device.
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from trinity_megatron.model.fusion import fused
    from trinity_megatron.model.moe.balance_loss import mean_balance_loss
    from trinity_megatron.model.moe.experts import weighted_swiglu
    from trinity_megatron.model.moe.router import route
    from trinity_megatron.model.norms import rms_norm_in_fp32

    query = empty(SEQ_LENGTH, 1, HEADS, HEAD, dtype=BF16).requires_grad_()
    gain = empty(HEAD, dtype=BF16).requires_grad_()
    fused(rms_norm_in_fp32, query)(query, gain, eps=1e-5).sum().backward()
    angles = empty(SEQ_LENGTH, 1, 1, HEAD)
    fused(_apply_rotary_pos_emb_bshd, query)(query, angles).sum().backward()
    logits = empty(SEQ_LENGTH, EXPERTS).requires_grad_()
    routing = fused(route, logits)(logits, empty(EXPERTS), topk=TOPK, route_scale=2.5)
    counts = torch.zeros(1, EXPERTS, dtype=torch.int64, device="cuda")
    loss, _ = fused(mean_balance_loss, logits)(routing.scores, counts, None, topk=TOPK, coeff=1.0)
    (routing.probs.sum() + loss).backward()
    hidden = empty(SEQ_LENGTH, 2 * EXPERT[1], dtype=BF16).requires_grad_()
    weighted_swiglu(hidden, empty(SEQ_LENGTH, 1)).sum().backward()


def launch_all(capability: str) -> None:
    """In a process of its own, before anything asks for the device."""
    os.environ["NULL_GPU_CAPABILITY"] = capability
    assert torch.cuda.get_device_capability() == divmod(int(capability), 10)
    launch_loss()
    launch_syrk()
    launch_attention()
    if TAKES_ALL:
        launch_compiled()


def main() -> None:
    """One after the other; imports are shared."""
    for capability in sys.argv[1:]:
        process = get_context("fork").Process(target=launch_all, args=(capability,))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"sm_{capability}: see above")


if __name__ == "__main__":
    main()
