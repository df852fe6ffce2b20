"""Muon in Megatron: ``--optimizer muon`` without the emerging-optimizers package.

Megatron keeps its matrix optimizers in a registry and builds them through the same code as Adam:
parameter groups, mixed precision, gradient clipping, checkpoints.  Our Muon takes the place of the
registered one, also where emerging-optimizers is installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import megatron.core.optimizer as core_optimizer
import torch
from megatron.core.optimizer import emerging_optimizers as registry
from megatron.core.optimizer.emerging_optimizers import EmergingOptimizerEntry
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection

from trinity_megatron.errors import UserError
from trinity_megatron.optimizer.fsdp.optimizer_chain import build_on_fsdp
from trinity_megatron.optimizer.fsdp.wrapper import TrinityFSDP, shards_of
from trinity_megatron.optimizer.muon import SCALES, Muon
from trinity_megatron.optimizer.newton_schulz import COEFFICIENTS, coefficient_schedule
from trinity_megatron.optimizer.param_groups import attach_muon_splits, is_adam_parameter
from trinity_megatron.optimizer.sharded.buffer_layout import aligned_expert_buffers
from trinity_megatron.optimizer.sharded.distributed_optimizer import ResumableDistributedOptimizer
from trinity_megatron.optimizer.sharded.optimizer_chain import (
    SkippingOptimizer,
    build_sharded,
    init_muon_state,
)
from trinity_megatron.upstream.registry import replaced

_TRAINING = "megatron.training.training"
_OPTIMIZER = "megatron.core.optimizer"
_EMERGING = "megatron.core.optimizer.emerging_optimizers"
# What Megatron copies from a weight to its float32 master: how Muon splits it, and its group.
_PARAM_ATTRIBUTES = "megatron.core.tensor_parallel.layers:_MODEL_PARALLEL_ATTRIBUTE_DEFAULTS"

# Arguments (by dest) whose defaults in Megatron are not Trinity's.
MUON_ARGUMENT_DEFAULTS: dict[str, Any] = {
    "muon_momentum": 0.95,
    "muon_scale_mode": "shape_scaling",
    "muon_tp_mode": "duplicated",
}

# --muon-fp32-matmul-prec -> what Newton-Schulz computes in; None: bfloat16 on CUDA, float32 on CPU.
_MATMUL_DTYPES: dict[str, torch.dtype | None] = {
    "low": torch.bfloat16,
    "medium": None,
    "high": torch.float32,
}

# --muon-momentum-dtype
MOMENTUM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Requests that Muon cannot meet: field -> reason and remedy.
_REFUSED = {
    # What Megatron makes of --use-distributed-optimizer in its own scripts; see
    # `finish_muon_arguments` for ours.
    "use_layer_wise_distributed_optimizer": "an unmodified script of Megatron cannot shard Muon, "
    "trinity-megatron train can; there drop --use-distributed-optimizer, and take --optimizer "
    "muon, not dist_muon",
    # https://github.com/NVIDIA/Megatron-LM/issues/5707
    "fp8_param_gather": "with Muon the fp8 weights would never be updated; drop --fp8-param-gather",
    "optimizer_cpu_offload": "only Adam's state can be offloaded; drop --optimizer-cpu-offload",
    "optimizer_cuda_graph": "Muon's step is not captured; drop --optimizer-cuda-graph",
    "overlap_param_gather_with_optimizer_step": "all its parts step before weights are gathered; "
    "drop --overlap-param-gather-with-optimizer-step",
    "use_precision_aware_optimizer": "it is Adam's; drop --use-precision-aware-optimizer",
    "use_mup": "muP's learning rates would be applied to stacked experts; drop --use-mup",
}


@dataclass(frozen=True)
class MuonSettings:
    """What the builders of optimizers need that is not in Megatron's ``OptimizerConfig``.

    Attributes:
        momentum_dtype: Key of ``MOMENTUM_DTYPES``.
        use_gloo_process_groups: ``--disable-gloo-process-groups`` turns it off.
        timeout: Of the process groups.
        skips_spikes: Whether a step may be skipped, by AdamW too.
    """

    momentum_dtype: str = "fp32"
    use_gloo_process_groups: bool = True
    timeout: timedelta = timedelta(minutes=10)
    skips_spikes: bool = False

    @classmethod
    def from_args(cls, args: Any) -> MuonSettings:
        """The settings of a run.

        Args:
            args: Megatron's arguments.
        """
        return cls(
            momentum_dtype=args.muon_momentum_dtype,
            use_gloo_process_groups=args.use_gloo_process_groups,
            timeout=timedelta(minutes=args.distributed_timeout_minutes),
            skips_spikes=args.skip_spikes is not None,
        )


@contextmanager
def registered_muon(settings: MuonSettings | None = None) -> Iterator[None]:
    """Let ``--optimizer muon`` mean our Muon while an optimizer is built in the block.

    AdamW's distributed optimizer is replaced too where it is torch's.

    Args:
        settings: Defaults to those of Megatron's defaults.
    """
    settings = settings or MuonSettings()
    entries = dict(registry._EMERGING_OPTIMIZERS)
    replacements: dict[str, Callable[[Any], Any]] = {}
    if registry.OrthogonalizedOptimizer is object:
        # The package is missing: without it this entry is an empty shell that the flag below would
        # declare usable.  `--optimizer adaptive_muon` now says "Unsupported emerging optimizer".
        entries.pop("adaptive_muon", None)
        replacements[f"{_EMERGING}:get_supported_coefficient_types"] = lambda _: (
            lambda: tuple(COEFFICIENTS)
        )
    entries["muon"] = EmergingOptimizerEntry(
        optimizer_cls=Muon,
        init_state_fn=init_muon_state,
        config_to_kwargs=functools.partial(_muon_kwargs, settings=settings),
        default_param_overrides={_ADAM_PARAMETERS: {"optimizer": "adam"}},
    )
    # Both modules hold the names, and each reads its own.
    for module in (_EMERGING, _OPTIMIZER):
        replacements[f"{module}:_EMERGING_OPTIMIZERS"] = lambda _: entries
        replacements[f"{module}:HAVE_EMERGING_OPTIMIZERS"] = lambda _: True
    replacements[_PARAM_ATTRIBUTES] = lambda attributes: {
        **attributes,
        "muon_split": None,
        "gradient_group": None,
    }
    replacements[f"{_OPTIMIZER}:_get_megatron_emerging_optimizer"] = lambda build: _build_muon_or(
        build, entries, settings
    )
    replacements[f"{_TRAINING}:get_megatron_optimizer"] = lambda build: build_on_fsdp_or(
        build, settings
    )
    if core_optimizer.Adam is torch.optim.AdamW:  # neither Transformer Engine nor apex
        replacements[f"{_OPTIMIZER}:DistributedOptimizer"] = lambda _: ResumableDistributedOptimizer
    with ExitStack() as stack:
        for target, make in replacements.items():
            stack.enter_context(replaced(target, make))
        stack.enter_context(aligned_expert_buffers())
        yield


def muon_param_overrides(config: Any) -> dict[ParamKey, ParamGroupOverride]:
    """Send every parameter that the table gives to AdamW there, at its own learning rate.

    Megatron's ``--decoupled-lr`` reaches the embedding and the output layer; under Muon it is the
    peak learning rate of all that AdamW updates.  The overrides combine with Megatron's standard
    ones (no weight decay on norms).

    Args:
        config: ``OptimizerConfig`` or parsed arguments.

    Returns:
        One override, for the parameters of `is_adam_parameter`.
    """
    override = ParamGroupOverride(optimizer="adam")
    if config.decoupled_lr is not None:
        override["max_lr"] = config.decoupled_lr
        if config.decoupled_min_lr is not None:
            override["min_lr"] = config.decoupled_min_lr
    return {_ADAM_PARAMETERS: override}


def validate_muon_arguments(args: Any) -> None:
    """Refuse what Muon cannot do, before Megatron's own checks or after them.

    Args:
        args: Megatron's parsed arguments.

    Raises:
        UserError: Names the argument, its value and the remedy.
    """
    if args.optimizer == "dist_muon":
        raise UserError(
            f"--optimizer {args.optimizer} is Megatron's own Muon. Remedy: take --optimizer "
            "muon --use-distributed-optimizer."
        )
    if args.use_distributed_optimizer and args.ckpt_format != "torch_dist":
        raise UserError(
            f"ckpt_format={args.ckpt_format!r} with optimizer='muon' and "
            "use_distributed_optimizer=True: the state is saved as torch_dist only. "
            "Remedy: drop --ckpt-format."
        )
    sizes = [args.tensor_model_parallel_size, getattr(args, "expert_tensor_parallel_size", None)]
    _check_settings(args, tensor_parallel_size=max(size or 1 for size in sizes))


_ADAM_PARAMETERS = ParamKey(
    with_name_predicate=ParamWithNamePredicate(name="trinity_adam", fn=is_adam_parameter)
)


def finish_muon_arguments(args: Any) -> None:
    """Undo what Megatron's checks turned ``--use-distributed-optimizer`` into for Muon.

    They replace it by its layer-wise optimizer; see `optimizer/sharded/optimizer_chain.py` for why
    not that.

    Args:
        args: Megatron's arguments after ``validate_args``.
    """
    if args.optimizer == "muon" and args.use_layer_wise_distributed_optimizer:
        args.use_layer_wise_distributed_optimizer = False
        args.use_distributed_optimizer = True


def _build_muon_or(
    build: Callable[..., Any], entries: dict[str, EmergingOptimizerEntry], settings: MuonSettings
) -> Callable[..., Any]:
    """Build Muon sharded, or as Megatron does with our overrides; other optimizers as before."""

    @functools.wraps(build)
    def wrapper(
        config: Any,
        model_chunks: list[Any],
        config_overrides: dict[ParamKey, Any] | None = None,
        pg_collection: Any = None,
    ) -> Any:
        if config.optimizer != "muon":
            return build(config, model_chunks, config_overrides, pg_collection)
        overrides = muon_param_overrides(config)
        if not config.use_distributed_optimizer:
            # Megatron wants constants here; ours follow the config.
            entries["muon"].default_param_overrides = overrides
            chain = build(config, model_chunks, config_overrides, pg_collection)
            return SkippingOptimizer(chain.chained_optimizers)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        kwargs = _muon_kwargs(config, model_chunks, groups, settings=settings)
        return build_sharded(
            config,
            model_chunks,
            {**(config_overrides or {}), **overrides},
            lambda param_groups: Muon(param_groups, **kwargs),
            use_gloo_process_groups=settings.use_gloo_process_groups,
            timeout=settings.timeout,
        )

    return wrapper


def build_on_fsdp_or(build: Callable[..., Any], settings: MuonSettings) -> Callable[..., Any]:
    """Build Muon or AdamW on the shards of Megatron-FSDP; optimizers of other models as before.

    Args:
        build: Megatron's ``get_megatron_optimizer``.
        settings: What is not in the ``OptimizerConfig``.

    Returns:
        The builder, with the same arguments.
    """

    @functools.wraps(build)
    def wrapper(
        config: Any,
        model_chunks: list[Any],
        config_overrides: dict[ParamKey, Any] | None = None,
        use_gloo_process_groups: bool = True,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(model_chunks[0], TrinityFSDP):
            chain = build(
                config,
                model_chunks,
                config_overrides,
                use_gloo_process_groups,
                pg_collection,
                **kwargs,
            )
            is_megatrons = type(chain) is ChainedOptimizer
            if settings.skips_spikes and is_megatrons:
                return SkippingOptimizer(chain.chained_optimizers)
            return chain
        overrides, muon_kwargs = dict(config_overrides or {}), {}
        if config.optimizer == "muon":
            groups = ProcessGroupCollection.use_mpu_process_groups()
            muon_kwargs = _muon_kwargs(config, model_chunks, groups, settings=settings)
            overrides |= muon_param_overrides(config)
        return build_on_fsdp(
            config,
            model_chunks,
            overrides,
            lambda param_groups: Muon(param_groups, **muon_kwargs),
            use_gloo_process_groups=settings.use_gloo_process_groups,
            timeout=settings.timeout,
        )

    return wrapper


def _muon_kwargs(
    config: Any, model_chunks: list[Any], pg_collection: Any, *, settings: MuonSettings
) -> dict[str, Any]:
    """Translate Megatron's ``OptimizerConfig``; split the model's fused parameters."""
    expert_tp = getattr(pg_collection, "expt_tp", pg_collection.tp)
    _check_settings(config, tensor_parallel_size=max(pg_collection.tp.size(), expert_tp.size()))
    for chunk in model_chunks:
        named = [(each.name, each.raw) for each in shards_of(chunk)] or chunk.named_parameters()
        trained = [(name, p) for name, p in named if p.requires_grad]
        attach_muon_splits(trained, chunk.config, split_qkv=config.muon_split_qkv)
    return {
        "lr": config.lr,
        "momentum": config.muon_momentum,
        "nesterov": config.muon_nesterov,
        "weight_decay": config.weight_decay,
        "scale": config.muon_scale_mode,
        "extra_scale_factor": config.muon_extra_scale_factor,
        "num_ns_steps": config.muon_num_ns_steps,
        "coefficients": config.muon_coefficient_type,
        "dtype": _MATMUL_DTYPES[config.muon_fp32_matmul_prec],
        "momentum_dtype": MOMENTUM_DTYPES[settings.momentum_dtype],
        "tp_group": pg_collection.tp,
        "expert_tp_group": expert_tp,
    }


def _check_settings(settings: Any, *, tensor_parallel_size: int) -> None:
    for field, reason in _REFUSED.items():
        if getattr(settings, field, False):
            why, _, remedy = reason.rpartition("; ")
            what = f"{field}={getattr(settings, field)} with optimizer='muon'"
            raise UserError(f"{what}: {why}. Remedy: {remedy}.")
    for field, known in (
        ("muon_coefficient_type", COEFFICIENTS),
        ("muon_scale_mode", SCALES),
        ("muon_fp32_matmul_prec", _MATMUL_DTYPES),
        ("muon_scalar_optimizer", ("adam",)),
    ):
        if getattr(settings, field) not in known:
            raise UserError(
                f"{field}={getattr(settings, field)!r} is not known to trinity_megatron's "
                f"Muon. Remedy: choose one of {sorted(known)}."
            )
    try:
        coefficient_schedule(settings.muon_coefficient_type, settings.muon_num_ns_steps)
    except ValueError as error:
        raise UserError(
            f"muon_num_ns_steps={settings.muon_num_ns_steps}: {error}. Remedy: --muon-num-ns-steps."
        ) from error
    if tensor_parallel_size > 1 and settings.muon_tp_mode != "duplicated":
        raise UserError(
            f"muon_tp_mode={settings.muon_tp_mode!r} with tensor parallelism: our Muon "
            "orthogonalizes whole matrices, each on one rank. Remedy: set --muon-tp-mode "
            "duplicated."
        )
    if not getattr(settings, "decoupled_weight_decay", True):
        raise UserError(
            "decoupled_weight_decay=False: Muon's weight decay is decoupled. Remedy: drop the flag."
        )
