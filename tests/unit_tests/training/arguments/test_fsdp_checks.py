"""What a sharded run does not do is refused by flag, before anything is built."""

from argparse import Namespace
from typing import Any

import pytest

from trinity_megatron.errors import UserError
from trinity_megatron.training.arguments.fsdp_checks import _REFUSED, check_fsdp, passing_as_adam


def make_args(**given: Any) -> Namespace:
    """Arguments of a sharded run on four ranks."""
    values: dict[str, Any] = {name: fine[0] for name, fine, _ in _REFUSED}
    values |= {
        "optimizer": "muon",
        "use_megatron_fsdp": True,
        "use_distributed_optimizer": False,
        "world_size": 4,
        "num_distributed_optimizer_instances": 1,
        "expert_model_parallel_size": 1,
        "data_parallel_sharding_strategy": "no_shard",
        "outer_dp_sharding_strategy": "no_shard",
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
        "megatron_fsdp_main_grads_dtype": "auto",
        "grad_reduce_in_bf16": False,
    }
    return Namespace(**{**values, **given})


OTHER_VALUES: dict[str, Any] = {
    "tensor_model_parallel_size": 2,
    "expert_tensor_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "ckpt_format": "fsdp_dtensor",
    "optimizer": "sgd",
    "megatron_fsdp_main_params_dtype": "bf16",
    "cuda_graph_impl": "local",
    "check_weight_hash_across_dp_replicas_interval": 10,
}


@pytest.mark.parametrize("name", [name for name, _, _ in _REFUSED])
def test_it_is_refused_by_its_flag(name: str) -> None:
    value = OTHER_VALUES.get(name, True)
    with pytest.raises(UserError) as error:
        check_fsdp(make_args(**{name: value}))
    text = str(error.value)
    assert f"--{name.replace('_', '-')}" in text and "Remedy" in text
    assert isinstance(value, bool) or str(value) in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_distributed_optimizer_instances": 3}, "3 replicas"),
        (
            {"num_distributed_optimizer_instances": 2, "expert_model_parallel_size": 4},
            "multiple of 8 ranks",
        ),
        (
            {
                "num_distributed_optimizer_instances": 2,
                "outer_dp_sharding_strategy": "optim",
                "data_parallel_sharding_strategy": "optim",
            },
            "--data-parallel-sharding-strategy optim",
        ),
        ({"outer_dp_sharding_strategy": "optim"}, "--num-distributed-optimizer-instances N"),
    ],
)
def test_replicas_that_do_not_divide_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match="Remedy") as error:
        check_fsdp(make_args(**given))
    assert words in str(error.value)


def test_what_follows_is_set() -> None:
    args = make_args()
    check_fsdp(args)
    assert args.use_distributed_optimizer and args.overlap_grad_reduce and args.overlap_param_gather
    assert args.data_parallel_sharding_strategy == "optim_grads_params"
    assert args.megatron_fsdp_main_grads_dtype == "fp32"
    args = make_args(grad_reduce_in_bf16=True, data_parallel_sharding_strategy="optim")
    check_fsdp(args)
    assert args.data_parallel_sharding_strategy == "optim"
    assert args.megatron_fsdp_main_grads_dtype == "auto"


def test_megatron_sees_what_it_knows_and_the_run_what_was_asked_for() -> None:
    args = make_args(ckpt_format="torch_dist")
    with passing_as_adam(args):
        assert (args.optimizer, args.ckpt_format) == ("adam", "fsdp_dtensor")
    assert (args.optimizer, args.ckpt_format) == ("muon", "torch_dist")
