"""RMSNorm of the ``local`` implementation.

Megatron's ``WrappedTorchNorm`` refuses sequence parallelism; this one marks its gain so that
Megatron sums its gradient over the tensor-parallel ranks.
"""

import torch
import torch.nn.functional as F
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
