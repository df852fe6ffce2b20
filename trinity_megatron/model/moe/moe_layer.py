"""The MoE layer."""

from typing import Any

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
