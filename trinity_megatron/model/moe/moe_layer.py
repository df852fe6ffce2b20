"""The MoE layer."""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.moe.token_dispatcher import LocalTokenDispatcher


class TrinityMoELayer(MoELayer):
    """Megatron's MoE layer, without Megatron's dispatcher where nothing has to be dispatched."""

    def __init__(self, config: TrinityConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        dispatcher: Any = getattr(self, "token_dispatcher")  # noqa: B009  (untyped upstream)
        assert dispatcher is not None
        # The dispatcher would compute the shared experts where they overlap with it.
        is_plain = config.moe_token_dispatcher_type == "alltoall" and not self.shared_expert_overlap
        if is_plain and dispatcher.tp_ep_group.size() == 1:
            self.token_dispatcher = LocalTokenDispatcher(config, kwargs.get("pg_collection"))

    def postprocess(
        self, output: torch.Tensor, shared_expert_output: torch.Tensor | None
    ) -> torch.Tensor:
        """As Megatron's; the dispatcher then lets go of what belongs to the graph of this pass.

        Megatron's keep the routing weights until the next pass, and with them, under full
        recompute, the gradient of the layer's input: a hidden state for each MoE layer.
        """
        output = super().postprocess(output, shared_expert_output)
        dispatcher: Any = self.token_dispatcher
        for holder in (dispatcher, getattr(dispatcher, "_comm_manager", None)):
            for name, value in getattr(holder, "__dict__", {}).items():
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    setattr(holder, name, None)
        return output
