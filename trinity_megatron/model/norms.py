"""RMSNorm of the two implementations.

Megatron's ``WrappedTorchNorm`` refuses sequence parallelism; the ``local`` one here marks its gain
so that Megatron sums its gradient over the tensor-parallel ranks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.transformer.transformer_config import TransformerConfig

from trinity_megatron.model.fusion import fused

# torch's kernel on CUDA computes in fp32 whatever the dtype, and rounds once.  But from this number
# of rows on it sums the gradient of the gain in two steps, and rounds the partial sums, of 32 rows
# each, to the dtype of the gain.  Source: LaunchGammaBetaBackwardCUDAKernel in
# aten/src/ATen/native/cuda/layer_norm_kernel.cu of github.com/pytorch/pytorch.
_ROWS_SUMMED_AT_ONCE = 64 * 1024


def rms_norm_in_fp32(
    hidden_states: torch.Tensor, weight: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``, computed in fp32 and rounded once.

    Args:
        hidden_states: x, ``[..., hidden_size]``.
        weight: ``[hidden_size]``.
        eps: Added to the mean square.

    Returns:
        In the dtype of ``hidden_states``.

    Source: report section 2.3; transformers ``AfmoeRMSNorm``.
    """
    normed = F.rms_norm(hidden_states.float(), weight.shape, weight.float(), eps)
    return normed.to(hidden_states.dtype)


class TrinityRMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension, computed and scaled in fp32, returned in the input's dtype.

    Args:
        config: Megatron config; ``sequence_parallel`` and ``params_dtype`` are read.
        hidden_size: Size of the last dimension.
        eps: Added to the mean square.

    Source: report section 2.3; transformers ``AfmoeRMSNorm``.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: object
    ) -> None:
        super().__init__()
        self.eps = eps
        device = torch.device("cpu") if config.use_cpu_initialization else None
        device = device or torch.device(torch.cuda.current_device())
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise ``[..., hidden_size]``."""
        if hidden_states.dtype == torch.float32 or self._is_summed_at_once(hidden_states):
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)
        compute = fused(rms_norm_in_fp32, hidden_states)
        return compute(hidden_states, self.weight, eps=self.eps)

    def _is_summed_at_once(self, hidden_states: torch.Tensor) -> bool:
        """Whether torch's kernel rounds nothing but its results, for a dtype below fp32."""
        num_rows = hidden_states.numel() // hidden_states.shape[-1]
        is_fused = hidden_states.is_cuda and self.weight.dtype == hidden_states.dtype
        # The kernel would copy a view in each direction.
        return is_fused and hidden_states.is_contiguous() and num_rows <= _ROWS_SUMMED_AT_ONCE


class TrinityTENorm:
    """Builds Transformer Engine's RMSNorm, without the extra state that only it would have.

    A norm computes nothing in FP8, so its extra state is empty; left in, a checkpoint of the
    ``local`` implementation would lack a key.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> Any:
        """Return the norm; see `TrinityRMSNorm` for the arguments."""
        norm: Any = TENorm(config, hidden_size, eps)
        norm._register_state_dict_hook(_drop_extra_state)
        norm._register_load_state_dict_pre_hook(expect_no_extra_state)
        return norm


def _drop_extra_state(norm: torch.nn.Module, state_dict: dict, prefix: str, *args: object) -> None:
    state_dict.pop(f"{prefix}_extra_state", None)


def expect_no_extra_state(state_dict: dict, prefix: str, *args: object) -> None:
    """A hook before loading: a Transformer Engine module need not find an extra state."""
    state_dict.setdefault(f"{prefix}_extra_state", None)
