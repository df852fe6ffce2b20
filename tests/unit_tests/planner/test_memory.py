"""The arithmetic of memory against tensors that are really there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trinity_megatron.doctor.throughput import GPU_MODELS
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.presets import trinity_preset
from trinity_megatron.planner.memory import TrainingMemory, activation_memory, training_memory
from trinity_megatron.planner.muon_work import plan_muon

Build = Callable[..., Any]
DTYPES = {2: torch.bfloat16, 4: torch.float32}
NUM_TOKENS = 48


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def train_step(model: Any, weight_bytes: int, optimizer: str, **ddp: Any) -> tuple[Any, Any]:
    """Megatron's DDP and optimizer around the model, after one step."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from trinity_megatron.optimizer.register import registered_muon

    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, **ddp), model
    )
    settings = OptimizerConfig(
        optimizer=optimizer,
        lr=1e-3,
        bf16=weight_bytes == 2,
        muon_scale_mode="shape_scaling",
        muon_tp_mode="duplicated",
    )
    with registered_muon():
        chain = get_megatron_optimizer(settings, [wrapped])
    wrapped.zero_grad_buffer()
    tokens = torch.randint(model.config.vocab_size, (2, 24))
    wrapped(tokens, torch.arange(24).expand(2, -1), None, labels=tokens).float().mean().backward()
    chain.step()
    return wrapped, chain


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
@pytest.mark.parametrize("weight_bytes", [2, 4])
def test_equals_what_a_training_holds(weight_bytes: int, optimizer: str, build: Build) -> None:
    dtype = DTYPES[weight_bytes]
    model = build(params_dtype=dtype, bf16=weight_bytes == 2).to(dtype)
    wrapped, chain = train_step(model, weight_bytes, optimizer)
    terms = training_memory(
        model.config, seq_length=24, weight_bytes=weight_bytes, optimizer=optimizer
    )
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    assert terms.weights == size([*model.parameters(), *model.buffers()])
    assert terms.gradients == size(buffer.grad_data for buffer in buffers)
    weights = {id(parameter) for parameter in model.parameters()}
    held = 0
    for part in chain.chained_optimizers:
        inner = part.optimizer
        owned = [p for group in inner.param_groups for p in group["params"]]
        held += size(p for p in owned if id(p) not in weights)  # masters
        states = [t for state in inner.state.values() for t in state.values()]
        held += size(t for t in states if isinstance(t, torch.Tensor) and t.dim() > 0)
    assert terms.optimizer == held


def test_agrees_with_the_plan_of_a_cluster() -> None:
    config = trinity_preset("nano")
    terms = training_memory(config, seq_length=4096)
    plan = plan_muon(config, config.vocab_size, world_size=1)
    assert terms.optimizer == int(plan.state_bytes.sum())
    # Half of the experts on a rank, each rank with the rest.
    halves = training_memory(config, seq_length=4096, expert_parallel=2)
    experts = 3 * config.hidden_size * config.moe_ffn_hidden_size * config.num_moe_experts
    assert terms.gradients - halves.gradients == config.num_moe_layers * experts * 4 // 2


def test_stages_add_up_to_the_model() -> None:
    config = trinity_preset("large")
    whole = training_memory(config, seq_length=8192)
    stages = [
        training_memory(config, seq_length=8192, layers=range(start, start + 15))
        for start in range(0, 60, 15)
    ]
    for name in ("weights", "gradients", "optimizer"):
        assert sum(getattr(stage, name) for stage in stages) == getattr(whole, name)
    sums = {name: sum(s.activations[name] for s in stages) for name in whole.activations}
    assert sums == whole.activations
    assert whole.gradients == 4 * (config.num_parameters() - 54 * 256)  # the biases are not trained


def test_activations_are_what_autograd_keeps_in_bf16(build: Build) -> None:
    dtype = torch.bfloat16
    model = build(params_dtype=dtype, bf16=True, hidden_size=128, window_size=(63, 0)).to(dtype)
    kept = kept_by_module(model)
    terms = activation_memory(model.config, NUM_TOKENS, 2, range(4), True)
    norms = sum(kept.pop(name) for name in list(kept) if name.endswith("layernorm"))
    # Without the fused kernel, torch keeps what is normalised beside what it made of it, in fp32.
    assert norms == pytest.approx(4 * terms.pop("norms"), rel=0.03)
    terms.pop("logits")
    # Masks, angles, indices and norms of a row are left out; they do not grow with the widths.
    assert sum(kept.values()) == pytest.approx(sum(terms.values()), rel=0.06)


def kept_by_module(model: Any) -> dict[str, int]:
    """Bytes that the backward pass of the decoder and the head needs, by module."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    inside, held, kept = [""], {}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.data_ptr() not in held:
            held[storage.data_ptr()] = tensor  # alive, or another takes its address
            kept[inside[-1]] = kept.get(inside[-1], 0) + storage.nbytes()
        return tensor

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, name=name: inside.append(name))
        module.register_forward_hook(lambda module, inputs, output: (inside.pop(), None)[1])
    tokens = torch.randint(model.config.vocab_size, (2, NUM_TOKENS // 2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, torch.arange(NUM_TOKENS // 2).expand(2, -1), None)
    return kept


@pytest.mark.parametrize("name", GPU_MODELS)
def test_the_models_of_gpu_check_fit(name: str) -> None:
    model = GPU_MODELS[name]
    config: TrinityConfig = model.config()
    terms: TrainingMemory = training_memory(
        config, seq_length=model.seq_length, micro_batch_size=model.micro_batch_size
    )
    # FP8 copies of the weights of all linear layers, by rows and by columns, and 8 GiB for the
    # CUDA context, workspaces and what the allocator cannot use.
    copies = terms.weights
    assert terms.total + copies + 8 * 2**30 < 78 * 2**30
