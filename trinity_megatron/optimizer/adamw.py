"""torch's AdamW, whose update is one kernel on a GPU."""

from collections.abc import Callable
from typing import Any

import torch


class DeviceAdamW(torch.optim.AdamW):
    """torch's AdamW: fused on a GPU, as it is elsewhere.

    Without Transformer Engine and apex Megatron takes torch's in its default form, which goes over
    all parameters and moments ten times: 98 GB for the embedding and head of Trinity Large, of
    which the fused one moves 34.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update; the setting follows the device, whatever a checkpoint has said.

        Args:
            closure: Of torch's optimizers.
        """
        for group in self.param_groups:
            on_gpu = any(param.is_cuda for param in group["params"])
            group["fused"] = True if on_gpu else None
            for param in group["params"] if on_gpu else ():
                step = self.state.get(param, {}).get("step")
                if step is not None and step.device != param.device:  # from a checkpoint
                    self.state[param]["step"] = step.to(param.device, torch.float32)
        return super().step(closure)
