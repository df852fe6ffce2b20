"""RMSNorm of the two implementations.

Megatron's ``WrappedTorchNorm`` refuses sequence parallelism; the ``local`` one here marks its gain
so that Megatron sums its gradient over the tensor-parallel ranks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.transformer.transformer_config import TransformerConfig


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
        shape = self.weight.shape
        if hidden_states.dtype == torch.float32:
            return F.rms_norm(hidden_states, shape, self.weight, self.eps)
        normed = F.rms_norm(hidden_states.float(), shape, self.weight.float(), self.eps)
        return normed.to(hidden_states.dtype)


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
