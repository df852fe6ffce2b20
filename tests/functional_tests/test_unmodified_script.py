"""``--spec trinity_megatron.layer_specs get_trinity_layer_spec`` with Megatron's own classes."""

import gc
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # imports megatron.training


def test_a_plain_config_builds_the_same_model(tmp_path: Path) -> None:
    from trinity_megatron.host import enter_host

    enter_host()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    from trinity_megatron.config import TRINITY_ARCHITECTURE, TrinityConfig
    from trinity_megatron.layer_specs import get_trinity_layer_spec
    from trinity_megatron.moe.finalize import finalize_model_grads
    from trinity_megatron.training.model_builder import TrinityModelConfig

    fields = {
        **TRINITY_ARCHITECTURE,
        "transformer_impl": "local",
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "moe_router_topk_scaling_factor": 2.5,
        "window_size": (7, 0),
    }
    models: list = []
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        for config_type, transformer in (
            (GPTModelConfig, TransformerConfig(**fields, moe_layer_freq=[0, 1, 1, 1])),
            (TrinityModelConfig, TrinityConfig(**fields, num_dense_layers=1)),
        ):
            config = config_type(
                transformer=transformer,
                transformer_layer_spec=get_trinity_layer_spec,
                vocab_size=96,
                seq_length=32,
                position_embedding_type="rope",
            )
            groups = ProcessGroupCollection.use_mpu_process_groups()
            (model,) = GPTModelBuilder(config).build_distributed_models(
                groups, wrap_with_ddp=False, mixed_precision_wrapper=None
            )
            assert isinstance(config.transformer, TrinityConfig)
            assert config.transformer is model.config
            assert model.config.finalize_model_grads_func is finalize_model_grads
            models.append(model)
        plain, ours = (model.state_dict() for model in models)
        assert list(plain) == list(ours)
        for name, tensor in ours.items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(plain[name], tensor), name
        assert any("post_mlp_layernorm" in name for name in plain)
        tokens = torch.arange(16).view(1, -1)
        with torch.no_grad():
            logits = [model.eval()(tokens, tokens, None) for model in models]
        assert torch.equal(*logits) and logits[0].std() > 0
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        # As in tests/unit_tests/conftest.py: nothing for later forked ranks to inherit.
        parallel_state._global_process_group_list = None
        models.clear()
        gc.collect()
