"""``--spec trinity_megatron.layer_specs get_trinity_layer_spec`` with Megatron's own classes."""

from pathlib import Path

import pytest
import torch

from tests.unit_tests.parallel_state import one_rank_world

pytestmark = pytest.mark.slow  # imports megatron.training


def test_a_plain_config_builds_the_same_model(tmp_path: Path) -> None:
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

    enter_host()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.utils import get_model_config, unwrap_model
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    from trinity_megatron.layer_specs import get_trinity_layer_spec
    from trinity_megatron.model.architecture import TRINITY_ARCHITECTURE
    from trinity_megatron.model.config import TrinityConfig
    from trinity_megatron.model.moe.bias_update import finalize_model_grads
    from trinity_megatron.training.model_builder import TrinityModelConfig

    fields = {
        **TRINITY_ARCHITECTURE,
        "transformer_impl": "local",
        "bf16": True,  # Float16Module keeps the config that the builder took before our spec ran
        "params_dtype": torch.bfloat16,
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
    models = []
    with one_rank_world(tmp_path / "store"):
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
            (wrapped,) = GPTModelBuilder(config).build_distributed_models(
                groups, DistributedDataParallelConfig()
            )
            # What Megatron's training loop asks; the bias would never move with another function.
            assert get_model_config(wrapped).finalize_model_grads_func is finalize_model_grads
            model = unwrap_model(wrapped)
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
        models.clear()  # they hold process groups
        del model, wrapped, config, groups
