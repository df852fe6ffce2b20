"""The metrics of a step: collected in the modules, exchanged once, written by Megatron's writers.

In a logging step the modules observe (``telemetry.step_statistics``);
afterwards one all-gather over all ranks brings the statistics, the micro-batch losses and the
gradient norms of all layers together, and, with pipeline parallelism, one all-reduce the counts and
biases of all stages.  In other steps nothing is exchanged or copied to the host.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import (
    get_current_running_global_batch_size,
    get_num_microbatches,
)
from megatron.core.transformer.moe.moe_logging import (
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer

from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.device_copy import to_host
from trinity_megatron.model.moe.bias_update import BiasUpdate
from trinity_megatron.optimizer.muon import Muon, UpdateStatistics
from trinity_megatron.optimizer.param_groups import local_gradient_squares
from trinity_megatron.planner.flops import peak_flops, training_flops_per_token
from trinity_megatron.telemetry.metrics import (
    batch_heterogeneity,
    count_idle_steps,
    load_share,
    logit_metrics,
    routing_metrics,
)
from trinity_megatron.telemetry.step_statistics import GRADIENT_GROUPS, statistics_of
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, LAYER_NUMBERS_TAG, TOKENS_TAG
from trinity_megatron.training.callbacks.callback import Callback
from trinity_megatron.upstream.registry import replaced

# torch 2.13 has renamed it, and warns of the old name.
_all_gather = getattr(
    torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor
)


class StepMetrics(Callback):
    """Collects and writes the metrics of the steps of one training.

    Args:
        config: Of the model.

    Attributes:
        latest: The scalars that were written last, by name; empty on ranks that write none.
    """

    def __init__(self, config: TrinityConfig) -> None:
        self.config = config
        self.latest: dict[str, float] = {}
        self._statistics = statistics_of(config)
        self._update: BiasUpdate | None = None
        self._idle_steps: torch.Tensor | None = None
        self._seconds = 0.0
        self._tokens = 0
        self._has_layer_numbers = False
        self._rates: dict[str, float] = {}
        self._muons: list[Muon] = []
        self._start = 0.0

    @contextmanager
    def installed(self) -> Iterator[Callback]:
        """Replace Megatron's MoE metrics and its count of FLOPs while the block runs.

        The count, which the log, the checkpoints and ``--log-throughput`` read, accounts for
        sliding-window attention.
        """
        tracker = get_moe_metrics_tracker()
        set_moe_metrics_tracker(_LoggingStepTracker())
        flops = "megatron.training.training:num_floating_point_operations"
        try:
            with replaced(flops, lambda _: self._count_flops):
                yield self
        finally:
            set_moe_metrics_tracker(tracker)
            self._statistics.is_collecting = False
            self._statistics.clear()

    def on_train_step_start(self, iteration: int, model: Any, optimizer: Any) -> None:
        """Let the modules and Muon observe a step that is logged."""
        self._update = None
        self._statistics.clear()
        self._statistics.is_collecting = is_logging_step(iteration)
        self._rates = learning_rates(optimizer) if self._statistics.is_collecting else {}
        self._muons = find_muons(optimizer) if self._statistics.is_collecting else []
        for muon in self._muons:
            muon.statistics = UpdateStatistics()
        self._start = time.perf_counter()

    def on_train_step_end(self, iteration: int, model: Any, optimizer: Any, result: Any) -> None:
        """Exchange and write the metrics of a step that is logged."""
        seconds = time.perf_counter() - self._start
        self._seconds += seconds
        self._tokens += get_args().seq_length * get_current_running_global_batch_size()
        if not self._statistics.is_collecting:
            return
        self._statistics.is_collecting = False
        measured = [muon.statistics for muon in self._muons if muon.statistics is not None]
        for muon in self._muons:
            muon.statistics = None
        if self._update is not None:  # not a step that was skipped
            rates = {**self._rates, **muon_share(measured, seconds)}
            self._write(optimizer, self._update, rates, measured, result)

    def _count_flops(
        self,
        args: Any,
        batch_size: int,
        seqlen_squared_sum_in_batch: float | None = None,
        total_real_tokens_in_batch: float | None = None,
    ) -> float:
        """FLOPs of a global batch, in the place of Megatron's function of that name.

        The squares of the document lengths are not used: behind a window they say nothing.
        """
        tokens = total_real_tokens_in_batch or batch_size * args.seq_length
        return tokens * training_flops_per_token(self.config, args.seq_length)

    def observe_bias_update(self, update: BiasUpdate) -> None:
        """Keep the update of the step, and count the steps in which an expert was idle."""
        self._update = update
        counts = update.tokens_per_expert
        if self._idle_steps is None:
            self._idle_steps = torch.zeros_like(counts)
        self._idle_steps = count_idle_steps(self._idle_steps, counts)

    def _write(
        self,
        optimizer: Any,
        update: BiasUpdate,
        rates: dict[str, float],
        muon: Sequence[UpdateStatistics],
        result: Any,
    ) -> None:
        """Exchange and write; every rank comes here in a logging step."""
        device = torch.device(torch.cuda.current_device())
        squares, updates = local_gradient_squares(optimizer, _replicas), _update_sums(muon, device)
        own = (
            self._statistics.take(self.config.num_layers, device),
            self._statistics.take_micro_batches(get_num_microbatches(), device),
            torch.cat([squares, updates.flatten()]),
        )
        everyone = _gather(*own)
        layers = self._layers_of_all_stages(update)
        writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
        speed = self._speed(device, is_writer=writer is not None)
        if writer is None:
            return
        losses_of_step, grad_norm = result[0], result[5]
        # The one wait for the device.  Megatron logs each loss several times.
        everyone, reduced, *tables = to_host(
            [everyone, list(losses_of_step.values()), *(layers or (None,))[1:]]
        )
        losses_of_step.update(zip(losses_of_step, [r.squeeze() for r in reduced], strict=True))
        statistics, losses, sums = _combine(everyone, *own)
        squares, updates = sums[: len(squares)], sums[len(squares) :].view(-1, 2)
        iteration = get_args().curr_iteration + 1
        scalars = {
            **logit_metrics(statistics, z_loss_coeff=self.config.lm_head_z_loss_coeff),
            "data/batch_het": batch_heterogeneity(*losses.unbind(-1)).item(),
            **_gradient_norms(squares, grad_norm),
            **_update_metrics(updates),
            **rates,
            "train/tokens_seen": _tokens_seen(),
            **speed,
        }
        if layers is not None:
            numbers, (counts, bias, momentum, idle) = layers[0], tables
            scalars.update(routing_metrics(counts, bias, momentum, idle))
            self._write_tensors(writer, numbers, counts, bias, iteration)
        self.latest.update(scalars)
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
        if wandb_writer:
            wandb_writer.log(scalars, iteration)
            interval = get_args().eval_interval
            if layers is not None and interval and iteration % interval == 0:
                picture = load_picture(load_share(counts))
                wandb_writer.log_image("moe/load_by_layer", picture, iteration)

    def _write_tensors(
        self,
        writer: Any,
        numbers: torch.Tensor,
        counts: torch.Tensor,
        bias: torch.Tensor,
        iteration: int,
    ) -> None:
        if not self._has_layer_numbers:
            writer.add_tensor(LAYER_NUMBERS_TAG, numbers, iteration)
            self._has_layer_numbers = True
        writer.add_tensor(TOKENS_TAG, counts, iteration)
        writer.add_tensor(BIAS_TAG, bias, iteration)

    def _layers_of_all_stages(self, update: BiasUpdate) -> tuple[torch.Tensor, ...] | None:
        """Layer numbers, counts, bias, momentum and idle steps of the MoE layers of all stages.

        A stage holds some of the layers; one sum over the pipeline of tables that are zero
        elsewhere puts them together.  fp64 holds counts below 2**53 and fp32 exactly.
        """
        numbers = torch.tensor(update.layer_numbers, dtype=torch.int64)
        tables = [update.tokens_per_expert, update.expert_bias, update.bias_momentum]
        tables.append(self._idle_steps)  # type: ignore[arg-type]
        group = mpu.get_pipeline_model_parallel_group()
        if group.size() == 1:
            return (numbers, *tables) if len(numbers) else None
        device, experts = torch.cuda.current_device(), self.config.num_moe_experts or 0
        rows = torch.zeros(
            self.config.num_layers + 1, 4, experts, dtype=torch.float64, device=device
        )
        if len(numbers):
            rows[numbers.to(device)] = torch.stack([table.double() for table in tables], dim=1)
        torch.distributed.all_reduce(rows, group=group)
        numbers = torch.arange(self.config.num_dense_layers + 1, self.config.num_layers + 1)
        counts, bias, momentum, idle = rows[numbers.to(device)].unbind(1)
        if not len(numbers):
            return None
        return numbers, counts.long(), bias.float(), momentum.float(), idle.long()

    def _speed(self, device: torch.device, *, is_writer: bool) -> dict[str, float]:
        """Tokens/s of the training steps since the last logging step, and MFU; starts anew.

        Evaluation, checkpoints and logging itself are not in it.
        """
        tokens, seconds = self._tokens, self._seconds
        self._tokens, self._seconds = 0, 0.0
        if not is_writer:
            return {}
        args = get_args()
        flops = training_flops_per_token(self.config, args.seq_length) * tokens / seconds
        return {
            "speed/tokens_per_second": tokens / seconds,
            "speed/mfu": flops / (peak_flops(device) * args.world_size),
        }


class _LoggingStepTracker(MoEMetricsTracker):
    """Megatron's tracker of the balance losses; it would exchange and read them in every step."""

    def report(self, loss_scale: float, iteration: int, *args: Any, **kwargs: Any) -> str:
        settings = get_args()
        is_written, is_shown = is_logging_step(iteration), iteration % settings.log_interval == 0
        if not (is_written or is_shown) or not any(settings.moe_layer_freq):
            self.clear()
            return ""
        if not is_written:
            kwargs.update(writer=None, wandb_writer=None)
        # Its mean for the console would take steps into account that were not exchanged.
        kwargs["total_loss_dict"] = None
        # Megatron finds "aux_loss" inside "seq_aux_loss" and would log a loss that is always zero.
        if settings.moe_router_load_balancing_type in ("seq_aux_loss", "global_aux_loss"):
            kwargs["track_names"].remove("load_balancing_loss")
        return super().report(loss_scale, iteration, *args, **kwargs)

    def _aggregate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Megatron would wait for the device for each name and each writer.
        return to_host(super()._aggregate(*args, **kwargs))

    @staticmethod
    def _format(scalars: dict) -> str:
        return "".join(f" {name}: {float(value):.6E} |" for name, value in scalars.items())


def is_logging_step(iteration: int) -> bool:
    """Whether the metrics of a step (from 1) are written; the same on every rank."""
    args = get_args()
    has_writer = bool(args.tensorboard_dir)  # Megatron logs to W&B only beside TensorBoard
    return has_writer and iteration % args.tensorboard_log_interval == 0


def learning_rates(optimizer: Any) -> dict[str, float]:
    """``lr/muon`` and ``lr/adamw`` of the step to come (the highest of the parameter groups)."""
    rates: dict[str, float] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        name = "lr/muon" if isinstance(inner, Muon) else "lr/adamw"
        for group in inner.param_groups:
            rates[name] = max(rates.get(name, 0.0), float(group["lr"]))
    return rates


def load_picture(load: torch.Tensor) -> Any:
    """Heat map of one step: a row for each layer, a column for each expert, white at the mean.

    Args:
        load: Load relative to the mean, ``[num_layers, num_experts]``.

    Returns:
        RGB, uint8 ``[height, width, 3]``.
    """
    from matplotlib import colormaps

    colors = colormaps["RdBu_r"]((load / 2).clamp(0, 1).cpu().numpy(), bytes=True)[..., :3]
    return colors.repeat(8, axis=0).repeat(4, axis=1)


def _gather(statistics: torch.Tensor, losses: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """One all-gather over all ranks of what :func:`_combine` takes, fp64 ``[ranks, numbers]``."""
    # Tensor-parallel ranks have the same tokens: one of them speaks.
    speaks = mpu.get_tensor_model_parallel_rank() == 0
    place = torch.full_like(losses[0, :1], mpu.get_data_parallel_rank())  # waits for no copy
    own = torch.cat([statistics.flatten(), (losses * speaks).flatten(), squares, place])
    ranks = torch.distributed.get_world_size()
    if ranks == 1:
        return own.view(1, -1)
    everyone = own.new_empty(ranks * own.numel())
    _all_gather(everyone, own)
    return everyone.view(ranks, -1)


def _combine(
    everyone: torch.Tensor, statistics: torch.Tensor, losses: torch.Tensor, squares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What all ranks have said, together.

    Args:
        everyone: From :func:`_gather`, on the host.
        statistics: This rank's, fp64 ``[names, num_layers + 1, 3]``.
        losses: Loss sum and tokens of this rank's micro-batches, fp64 ``[M, 2]``.
        squares: This rank's share of sums over all ranks, fp64 ``[sums]``.

    Returns:
        The same of all ranks: statistics; losses of all data-parallel ranks' micro-batches,
        ``[dp * M, 2]``; sums.
    """
    ranks = len(everyone)
    sizes = [statistics.numel(), losses.numel(), squares.numel(), 1]
    seen, lost, norms, places = everyone.split(sizes, dim=1)
    seen = seen.view(ranks, *statistics.shape)
    total = torch.cat([seen[..., :2].sum(0), seen[..., 2:].amax(0)], dim=-1)
    # The parts of a sequence on context-parallel ranks are one micro-batch.
    micro_batches = torch.zeros(mpu.get_data_parallel_world_size(), losses.numel()).double()
    micro_batches.index_add_(0, places.flatten().long(), lost)
    return total, micro_batches.view(-1, 2), norms.sum(0)


def _replicas(param: torch.Tensor) -> int:
    """Data-parallel ranks that hold the same gradient of a parameter."""
    if getattr(param, "allreduce", True):
        return mpu.get_data_parallel_world_size(with_context_parallel=True)
    return mpu.get_expert_data_parallel_world_size()


def _gradient_norms(squares: torch.Tensor, grad_norm: float | None) -> dict[str, float]:
    """Norm of each group before clipping; the gradients in memory are clipped.

    Nothing under FSDP, whose parameters are not ours.
    """
    if not squares.any():
        return {}
    limit = get_args().clip_grad
    clipped = 1.0
    if grad_norm is not None and limit > 0:
        clipped = min(1.0, limit / (grad_norm + 1e-6))  # as Megatron computes it
    norms = (squares.sqrt() / clipped).tolist()
    return {f"grad_norm/{name}": n for name, n in zip(GRADIENT_GROUPS, norms, strict=True)}


def find_muons(optimizer: Any) -> list[Muon]:
    """Every Muon of Megatron's optimizer."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in parts if isinstance(getattr(part, "optimizer", None), Muon)]


def muon_share(measured: Sequence[UpdateStatistics], seconds: float) -> dict[str, float]:
    """``muon/step_share``: time in Muon's step over that of the training step, on this rank."""
    return {"muon/step_share": sum(m.seconds() for m in measured) / seconds} if measured else {}


def _update_sums(measured: Sequence[UpdateStatistics], device: torch.device) -> torch.Tensor:
    """fp64 ``[groups + 1, 2]``: squares and elements of the update, last error and its count.

    Ranks with the same parameters count in both.
    """
    sums = torch.zeros(len(GRADIENT_GROUPS) + 1, 2, dtype=torch.float64, device=device)
    for found in measured:
        for name, square in found.squares.items():
            if name not in GRADIENT_GROUPS:
                continue
            row = sums[GRADIENT_GROUPS.index(name)]
            row[0] += square
            row[1] += found.numel[name]
        if found.orthogonality_error is not None:
            sums[-1, 0] += found.orthogonality_error
            sums[-1, 1] += 1
    return sums


def _update_metrics(sums: torch.Tensor) -> dict[str, float]:
    """RMS of Muon's update by group, and the mean error of the sampled matrices."""
    names = [*(f"update_rms/{name}" for name in GRADIENT_GROUPS), "muon/orthogonality_error"]
    values = (sums[:, 0] / sums[:, 1]).tolist()
    values = [*(value**0.5 for value in values[:-1]), values[-1]]
    return {n: v for n, v, count in zip(names, values, sums[:, 1].tolist(), strict=True) if count}


def _tokens_seen() -> int:
    """Tokens up to this step; Megatron adds the step's samples after it."""
    args = get_args()
    samples = args.consumed_train_samples + get_current_running_global_batch_size()
    return samples * args.seq_length
