"""Transformer layer with the depth-scaled sandwich norm."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.initialization import set_aside


@dataclass
class TrinityTransformerLayerSubmodules(TransformerLayerSubmodules):
    """Megatron's submodules plus the two post-norms."""

    post_attention_layernorm: LayerNormBuilder = IdentityOp
    post_mlp_layernorm: LayerNormBuilder = IdentityOp


class TrinityTransformerLayer(TransformerLayer):
    """A Megatron layer whose attention and MLP (or MoE) outputs are normalised before the add.

        a = x + N2(Attn(N1(x))),   y = a + N4(FFN(N3(a)))

    N4 stands around the sum of shared and routed experts.  The gains of N2 and N4 start at
    1/sqrt(L).  The first layer multiplies the embedding by sqrt(d): a layer is the one place that
    every model class, pipeline layout and launch script of Megatron has in common.

    Source: report eq 33-36 (norms), eq 39 (embedding).
    """

    config: TrinityConfig

    def __init__(
        self,
        config: TrinityConfig,
        submodules: TrinityTransformerLayerSubmodules,
        layer_number: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **kwargs)
        options = {
            "config": config,
            "hidden_size": config.hidden_size,
            "eps": config.layernorm_epsilon,
        }
        self.post_attention_layernorm = submodules.post_attention_layernorm(**options)
        self.post_mlp_layernorm = submodules.post_mlp_layernorm(**options)
        for norm in (self.post_attention_layernorm, self.post_mlp_layernorm):
            torch.nn.init.constant_(norm.weight, config.post_norm_gain)  # type: ignore[attr-defined]
        if config.set_matrices_aside:  # layer by layer: all of them may not fit a device
            set_aside(self)
        # The bias-dropout-add is where the sublayer's output meets the residual on every path of
        # Megatron, those that bypass forward() included.
        for name in ("self_attn_bda", "mlp_bda"):
            self._modules.pop(name, None)
        # Megatron has a graph of it even in a pass that is recomputed later; ours has a norm in it,
        # whose input would be kept until then.
        self.bias_dropout_add_exec_handler = nullcontext
        self.self_attn_bda = self._norm_then_add(self.post_attention_layernorm)
        self.mlp_bda = self._norm_then_add(self.post_mlp_layernorm)

    def _norm_then_add(self, norm: torch.nn.Module) -> Callable:
        def build(training: bool, fused: bool) -> Callable:
            def apply(
                output_with_bias: tuple[torch.Tensor, torch.Tensor | None],
                residual: torch.Tensor,
                dropout: float,
            ) -> torch.Tensor:
                output, bias = output_with_bias
                assert bias is None, "Trinity's linear layers have no bias"
                normed = norm(output)
                if dropout and training:
                    normed = torch.nn.functional.dropout(normed, dropout)
                return residual + normed

            return apply

        return build

    def _forward_attention(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.layer_number == 1 and not self.is_mtp_layer:
            hidden_states = hidden_states * self.config.embedding_multiplier
        return super()._forward_attention(hidden_states, *args, **kwargs)
