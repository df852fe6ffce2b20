"""Muon through Megatron's own builders: arguments, parameter groups, masters, checkpoint state.

The ranks build a small stock GPT with gated attention, a dense and a MoE layer.
"""

import copy
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import optimizer as core_optimizer
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, emerging_optimizers
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.optimizer.muon import MatrixSplit, Muon
from trinity_megatron.optimizer.register import (
    MUON_ARGUMENT_DEFAULTS,
    muon_param_overrides,
    registered_muon,
    validate_muon_arguments,
)
from trinity_megatron.optimizer.sharded.distributed_optimizer import ShardedOptimizer

LR, ADAM_LR, ADAM_MIN_LR = 0.02, 3e-3, 3e-4


def optimizer_config(**changes: Any) -> OptimizerConfig:
    values = {
        "optimizer": "muon",
        "lr": LR,
        "min_lr": 0.0,
        "decoupled_lr": ADAM_LR,
        "decoupled_min_lr": ADAM_MIN_LR,
        "weight_decay": 0.1,
        "clip_grad": 0.0,
        **MUON_ARGUMENT_DEFAULTS,
    }
    return OptimizerConfig(**{**values, **changes})


# --- without ranks --------------------------------------------------------------------------------


def test_registration_ends_with_its_block_and_leaves_no_empty_shells() -> None:
    modules = (core_optimizer, emerging_optimizers)
    before = [dict(vars(module)) for module in modules]
    with registered_muon():
        entry = emerging_optimizers._EMERGING_OPTIMIZERS["muon"]
        assert entry.optimizer_cls is Muon
        assert core_optimizer._EMERGING_OPTIMIZERS["muon"] is entry
        assert all(module.HAVE_EMERGING_OPTIMIZERS for module in modules)
        emerging_optimizers.validate_coefficient_type("dion")
        with pytest.raises(ValueError, match="cans"):
            emerging_optimizers.validate_coefficient_type("cans")
        # Usable only with the package, which --optimizer muon does not need.
        for name in ("adaptive_muon", "lion", "soap"):
            with pytest.raises(ValueError, match=f"Unsupported emerging optimizer: {name}"):
                core_optimizer.get_megatron_optimizer(
                    optimizer_config(optimizer=name), [None], {}, False
                )
    assert [dict(vars(module)) for module in modules] == before


def test_the_parameters_of_adam_get_the_decoupled_rate() -> None:
    (key,) = muon_param_overrides(optimizer_config())
    assert key.matches(torch.empty(8), "module.module.decoder.final_layernorm.weight")
    assert key.matches(torch.empty(8, 4), "module.module.embedding.word_embeddings.weight")
    assert not key.matches(torch.empty(2, 8, 4), "decoder.layers.1.mlp.experts.linear_fc1.weight")
    for changes, expected in (
        ({}, {"optimizer": "adam", "max_lr": ADAM_LR, "min_lr": ADAM_MIN_LR}),
        ({"decoupled_min_lr": None}, {"optimizer": "adam", "max_lr": ADAM_LR}),
        ({"decoupled_lr": None}, {"optimizer": "adam"}),
    ):
        config = optimizer_config(**changes)
        assert muon_param_overrides(config) == {key: expected}
        # Equal names must not conflict with Megatron's own overrides for embedding and output.
        for override in core_optimizer.get_standard_config_overrides(config).values():
            core_optimizer.combine_param_group_overrides([override, expected])


def arguments(**changes: Any) -> Any:
    """What validate_muon_arguments reads of Megatron's parsed arguments."""
    args = copy.copy(optimizer_config())
    args.__dict__.update({"tensor_model_parallel_size": 1, "fp8_param_gather": False, **changes})
    return args


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_layer_wise_distributed_optimizer": True}, "drop --use-distributed-optimizer, and"),
        ({"optimizer": "dist_muon"}, "take --optimizer muon --use-distributed-optimizer"),
        ({"use_distributed_optimizer": True, "ckpt_format": "torch"}, "drop --ckpt-format"),
        ({"fp8_param_gather": True}, "drop --fp8-param-gather"),
        ({"optimizer_cpu_offload": True}, "drop --optimizer-cpu-offload"),
        (
            {"overlap_param_gather_with_optimizer_step": True},
            "drop --overlap-param-gather-with-optimizer-step",
        ),
        ({"use_precision_aware_optimizer": True}, "drop --use-precision-aware-optimizer"),
        ({"optimizer_cuda_graph": True}, "drop --optimizer-cuda-graph"),
        ({"use_mup": True}, "drop --use-mup"),
        ({"muon_coefficient_type": "aol"}, "muon_coefficient_type='aol'.*'polar_express'"),
        ({"muon_num_ns_steps": 4}, "multiple of 5"),
        ({"muon_scale_mode": "none"}, "muon_scale_mode='none'.*'shape_scaling'"),
        ({"muon_fp32_matmul_prec": "highest"}, "muon_fp32_matmul_prec='highest'.*'medium'"),
        ({"muon_scalar_optimizer": "lion"}, "muon_scalar_optimizer='lion'.*'adam'"),
        (
            {"tensor_model_parallel_size": 2, "muon_tp_mode": "blockwise"},
            "set --muon-tp-mode duplicated",
        ),
        (
            {"expert_tensor_parallel_size": 2, "muon_tp_mode": "distributed"},
            "set --muon-tp-mode duplicated",
        ),
        ({"decoupled_weight_decay": False}, "drop the flag"),
    ],
)
def test_refusals_name_the_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_muon_arguments(arguments(**changes))


def test_what_is_supported_is_not_refused() -> None:
    validate_muon_arguments(arguments())
    validate_muon_arguments(arguments(muon_tp_mode="blockwise"))  # one rank: nothing to divide
    validate_muon_arguments(arguments(muon_coefficient_type="simple", muon_num_ns_steps=3))
    validate_muon_arguments(arguments(tensor_model_parallel_size=2, expert_tensor_parallel_size=1))


@pytest.mark.parametrize(
    ("state", "groups", "expected"),
    [
        ({0: {"step": torch.tensor(5.0)}}, [{"params": [0]}, {"params": []}], 5),  # torch's
        ({0: {}}, [{"params": [0], "step": 7}, {"params": []}], 7),  # FusedAdam's
        ({}, [{"params": []}, {"params": []}], 0),  # before the first step
    ],
)
def test_every_group_is_saved_with_the_step(
    state: dict[int, Any], groups: list[dict[str, Any]], expected: int
) -> None:
    part = ShardedOptimizer.__new__(ShardedOptimizer)
    part.grad_scaler = None
    content = {"state": state, "param_groups": groups}
    part.optimizer = SimpleNamespace(state_dict=lambda: content)
    saved = part.state_dict()["optimizer"]["param_groups"]
    assert saved == [{"step": expected}] * 2


# --- ranks ----------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_in_megatron(world: int, tmp_path: Path) -> None:
    """One rank from the command line to the learning rates; two tensor-parallel ranks."""
    # Forked: the children need not import Megatron again.
    torch.multiprocessing.start_processes(
        rank_main, (world, str(tmp_path / "store")), nprocs=world, start_method="fork"
    )


def rank_main(rank: int, world: int, store: str) -> None:
    enter_host()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    init_method = f"file://{store}"
    torch.distributed.init_process_group(
        "gloo", init_method=init_method, rank=rank, world_size=world
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    with registered_muon():
        if world == 1:
            check_command_line()
        else:
            check_tensor_parallel_step(bf16=False)
            check_tensor_parallel_step(bf16=True)
            check_refusals()
    torch.distributed.destroy_process_group()


def check_command_line() -> None:
    """From --optimizer muon to the peak learning rates of the scheduler."""
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.training import get_megatron_optimizer_config

    sys.argv = (
        "pretrain --optimizer muon --lr 0.02 --min-lr 0.002 --decoupled-lr 0.003 "
        "--decoupled-min-lr 0.0003 --muon-momentum 0.8 --muon-nesterov --muon-num-ns-steps 10 "
        "--muon-scale-mode shape_scaling --muon-extra-scale-factor 0.5 --weight-decay 0.1 "
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 8 "
        "--max-position-embeddings 8 --micro-batch-size 1 --train-iters 4 --eval-interval 1 "
        "--vocab-size 64 --tokenizer-type NullTokenizer --transformer-impl local "
        "--no-gradient-accumulation-fusion --no-persist-layer-norm --distributed-backend gloo"
    ).split()
    args = parse_args()
    validate_muon_arguments(args)
    validate_args(args)
    validate_muon_arguments(args)
    config, overrides = get_megatron_optimizer_config(args)
    model = build_model()
    optimizer = core_optimizer.get_megatron_optimizer(config, [model], overrides)
    muons = [inner(o) for o in optimizer.chained_optimizers if isinstance(inner(o), Muon)]
    assert muons
    for muon in muons:
        assert muon.nesterov and muon.extra_scale_factor == 0.5 and muon.dtype is None
        assert muon._newton_schulz.keywords["steps"] == 10
        assert all(group["momentum"] == 0.8 for group in muon.param_groups)
    scheduler = OptimizerParamScheduler(
        optimizer, 0.0, args.lr, args.min_lr, 0, 10, "linear", 0.1, 0.1, 10, "constant"
    )
    owners = owners_of(optimizer)
    check_owners(model, dict(owners))
    for increment, rates in (
        (0, {"muon": 0.02, "adam": 0.003}),
        (10, {"muon": 2e-3, "adam": 3e-4}),
    ):
        scheduler.step(increment)
        for name, param in model.named_parameters():
            owner, group = owners[id(param)]
            assert group["lr"] == pytest.approx(rates[owner])
            assert group["weight_decay"] == (0.0 if param.dim() == 1 else 0.1), name


def build_model(*, bf16: bool = False) -> Any:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=48,
        tensor_model_parallel_size=torch.distributed.get_world_size(),
        num_moe_experts=4,
        moe_layer_freq=[0, 1],
        moe_ffn_hidden_size=16,
        moe_shared_expert_intermediate_size=16,
        moe_grouped_gemm=False,
        gated_linear_unit=True,
        add_bias_linear=False,
        attention_output_gate=True,
        qk_layernorm=True,
        use_cpu_initialization=True,
        normalization="RMSNorm",
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    options = {"share_embeddings_and_output_weights": False, "position_embedding_type": "rope"}
    model = GPTModel(config, spec, vocab_size=64, max_sequence_length=8, **options)
    return model.bfloat16() if bf16 else model  # as Float16Module does


def inner(optimizer: Any) -> Any:
    return optimizer.optimizer


def owners_of(optimizer: Any) -> dict[int, tuple[str, dict[str, Any]]]:
    """The optimizer and the group of every parameter, by its id; each has one."""
    owners: dict[int, tuple[str, dict[str, Any]]] = {}
    for part in optimizer.chained_optimizers:
        name = "muon" if isinstance(inner(part), Muon) else "adam"
        for group in inner(part).param_groups:
            for param in group["params"]:
                assert id(param) not in owners
                owners[id(param)] = (name, group)
    return owners


def check_owners(model: Any, owners: dict[int, tuple[str, dict[str, Any]]]) -> None:
    for name, param in model.named_parameters():
        adam = param.dim() == 1 or "embedding" in name or "output_layer" in name
        main = getattr(param, "main_param", param)
        assert owners.pop(id(main))[0] == ("adam" if adam else "muon"), name
    assert not owners


def check_tensor_parallel_step(*, bf16: bool) -> None:
    """After one step every whole, separate matrix has moved by an orthogonal one."""
    config = optimizer_config(bf16=bf16, weight_decay=0.0, muon_fp32_matmul_prec="high")
    model = build_model(bf16=bf16)
    optimizer = core_optimizer.get_megatron_optimizer(config, [model])
    check_owners(model, owners_of(optimizer))
    before = {}
    for index, (name, param) in enumerate(model.named_parameters()):
        seed = 10 * index + torch.distributed.get_rank() * is_divided(param)
        param.main_grad = torch.randn(param.shape, generator=torch.manual_seed(seed))
        before[name] = getattr(param, "main_param", param).detach().clone()
    optimizer.step()
    for name, param in model.named_parameters():
        main = getattr(param, "main_param", param).detach()
        if param.dim() == 1 or "embedding" in name or "output_layer" in name:
            assert not torch.equal(main, before[name]), name
            continue
        split = getattr(param, "muon_split", None) or MatrixSplit((param.shape[0],))
        assert len(split.sizes) == 4 if "qkv" in name else len(split.sizes) == 1 + ("fc1" in name)
        change = (before[name] - main).unsqueeze(0) if main.dim() == 2 else before[name] - main
        for block in change.unflatten(1, (-1, sum(split.sizes))).split(split.sizes, dim=2):
            matrix = whole(block[0].flatten(0, 1), param)
            factor = LR * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
            values = torch.linalg.svdvals(matrix.double()) / factor
            # Some directions of a random square matrix are small; those are not raised to one.
            assert values.max() < 1.2 and values.median() > 0.85, (name, values)
    check_state(optimizer, model)


def is_divided(param: Any) -> bool:
    return getattr(param, "tensor_model_parallel", False)


def whole(matrix: torch.Tensor, param: Any) -> torch.Tensor:
    if not is_divided(param):
        return matrix
    shards = [torch.empty_like(matrix) for _ in range(2)]
    torch.distributed.all_gather(shards, matrix.contiguous())
    return torch.cat(shards, param.partition_dim)


def check_state(optimizer: Any, model: Any) -> None:
    """The momentum is sharded like the weights, under their names."""
    state = optimizer.sharded_state_dict(model.sharded_state_dict(), is_loading=True)
    keys = [getattr(value, "key", "") for value in nested_values(state)]
    keys = [key for key in keys if "optimizer.state.momentum_buffer.decoder." in key]
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "decoder" in n]
    assert len(keys) == len(matrices)
    assert any(key.endswith("self_attention.linear_qkv.weight") for key in keys)


def check_refusals() -> None:
    for changes, message in (
        ({"muon_tp_mode": "blockwise"}, "set --muon-tp-mode duplicated"),
        ({"muon_scalar_optimizer": "lion"}, "'lion'"),
    ):
        with pytest.raises(ValueError, match=message):
            core_optimizer.get_megatron_optimizer(optimizer_config(**changes), [build_model()])
