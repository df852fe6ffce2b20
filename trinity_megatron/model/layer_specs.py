"""Layer specs of the Trinity model: which modules it is made of.

``--spec trinity_megatron.layer_specs get_trinity_layer_spec`` works in an unmodified
``pretrain_gpt.py`` of Megatron.
"""

from functools import partial
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from trinity_megatron.errors import UserError
from trinity_megatron.model.attention.core_attention import TrinityDotProductAttention
from trinity_megatron.model.attention.self_attention import TrinitySelfAttention
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.initialization import initialize_parameters, initialize_wrapped
from trinity_megatron.model.linear import ColumnParallelLinear, RowParallelLinear
from trinity_megatron.model.moe.bias_update import finalize_model_grads
from trinity_megatron.model.moe.experts import TrinityGroupedMLP
from trinity_megatron.model.moe.moe_layer import TrinityMoELayer
from trinity_megatron.model.moe.router import TrinityRouter
from trinity_megatron.model.norms import TrinityRMSNorm, TrinityTENorm
from trinity_megatron.model.transformer_layer import (
    TrinityTransformerLayer,
    TrinityTransformerLayerSubmodules,
)


def get_trinity_layer_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage.

    Args:
        config: A :class:`TrinityConfig`, or Megatron's ``GPTModelConfig``, whose ``transformer``
            is made a ``TrinityConfig`` and which gets the initialisation hook.
        vp_stage: Virtual pipeline stage, if any.

    Raises:
        UserError: The config is of another architecture, or ``transformer_impl`` is unknown or
            not installed.
    """
    trinity = _prepare(config)
    backend = _Backend(trinity)
    specs = [
        backend.layer(is_moe=layer >= trinity.num_dense_layers)
        for layer in _layers_of_stage(trinity, vp_stage)
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=backend.norm)


def _prepare(config: Any) -> TrinityConfig:
    """Give the model its config, gradient finalizer and initialisation, in whatever script."""
    given = getattr(config, "transformer", config)
    trinity = TrinityConfig.from_transformer_config(given)
    # Megatron's builder has taken the given config for the bf16 wrapper already, and the training
    # loop asks the wrapper: without this the expert bias would never move there.
    for each in (given, trinity):
        if each.finalize_model_grads_func is None:
            each.finalize_model_grads_func = finalize_model_grads
    if hasattr(config, "transformer"):
        config.transformer = trinity
        trinity.vocab_size, trinity.rotary_base = config.vocab_size, config.rotary_base
        hooks = (*config.pre_wrap_hooks, *config.post_wrap_hooks)
        if initialize_parameters not in hooks and initialize_wrapped not in hooks:
            config.pre_wrap_hooks.append(initialize_parameters)
    return trinity


def _layers_of_stage(config: TrinityConfig, vp_stage: int | None) -> list[int]:
    """Indices (0-based) of the layers that this pipeline stage builds."""
    layout = config.pipeline_model_parallel_layout
    if isinstance(layout, PipelineParallelLayerLayout):
        return list(layout.get_layer_id_list(vp_stage=vp_stage))
    if config.pipeline_model_parallel_size == 1:
        return list(range(config.num_layers))
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)))


class _Backend:
    """The modules of ``local`` or of Transformer Engine, under the same parameter names."""

    def __init__(self, config: TrinityConfig) -> None:
        if config.transformer_impl == "local":
            self.column_linear: Any = ColumnParallelLinear
            self.row_linear: Any = RowParallelLinear
            self.norm: Any = TrinityRMSNorm
            self.core_attention: Any = TrinityDotProductAttention
            self.experts: Any = TrinityGroupedMLP
        elif config.transformer_impl == "transformer_engine":
            provider = _transformer_engine_provider()
            from trinity_megatron.model.moe.te_experts import TrinityTEGroupedMLP

            self.norm = TrinityTENorm
            self.column_linear = provider.column_parallel_linear()
            self.row_linear = provider.row_parallel_linear()
            self.core_attention = provider.core_attention()
            self.experts = TrinityTEGroupedMLP
        else:
            raise UserError(
                f"transformer_impl={config.transformer_impl!r} has no Trinity layers. "
                "Remedy: --transformer-impl local or transformer_engine."
            )

    def layer(self, *, is_moe: bool) -> ModuleSpec:
        """One layer: four norms, gated attention, dense MLP or MoE."""
        return ModuleSpec(
            module=TrinityTransformerLayer,
            submodules=TrinityTransformerLayerSubmodules(
                input_layernorm=self.norm,
                self_attention=self._attention(),
                post_attention_layernorm=self.norm,
                pre_mlp_layernorm=self.norm,
                mlp=self._moe() if is_moe else self._dense_mlp(),
                post_mlp_layernorm=self.norm,
            ),
        )

    def _linears(self) -> MLPSubmodules:
        return MLPSubmodules(
            linear_fc1=self.column_linear,
            linear_fc2=self.row_linear,
        )

    def _attention(self) -> ModuleSpec:
        return ModuleSpec(
            module=TrinitySelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=self.column_linear,
                core_attention=self.core_attention,
                linear_proj=self.row_linear,
                q_layernorm=self.norm,
                k_layernorm=self.norm,
            ),
        )

    def _dense_mlp(self) -> Any:
        return partial(MLP.as_mlp_submodule, submodules=self._linears())

    def _moe(self) -> Any:
        return partial(
            TrinityMoELayer,
            submodules=MoESubmodules(
                router=TrinityRouter,
                experts=self.experts,
                shared_experts=partial(SharedExpertMLP, submodules=self._linears()),
            ),
        )


def _transformer_engine_provider() -> BackendSpecProvider:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        raise UserError(
            "transformer_impl='transformer_engine', but Transformer Engine is not installed. "
            "Remedy: --transformer-impl local, or pip install 'trinity_megatron[gpu]'."
        )
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()
