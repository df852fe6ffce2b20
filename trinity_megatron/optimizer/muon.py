"""Muon: momentum, orthogonalized matrix by matrix.

Usable alone, on any torch model; `optimizer/builder.py` puts it into Megatron.  A parameter may say
more about itself with attributes, all of them optional and all but the first Megatron's own:

* ``muon_split``: a `MatrixSplit`, for a parameter that holds several matrices;
* ``tensor_model_parallel``, ``partition_dim``: the dimension of the parameter that is divided over
  the tensor-parallel group: 0 rows or 1 columns, for a stack of experts ``[E, out, in]`` 1 or 2;
* ``expert_tp`` True or ``allreduce`` False: a routed expert, with a tensor-parallel group of its
  own.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from trinity_megatron.cpu_host.numerics import sum_of_squares
from trinity_megatron.optimizer.newton_schulz import coefficient_schedule, orthogonalize
from trinity_megatron.optimizer.sharded.exchange import (
    Placement,
    Round,
    RunView,
    Sent,
    plan_rounds,
    plan_runs,
)
from trinity_megatron.optimizer.sharded.ownership import Shard, Stack, assign_dense, list_matrices

# Factor of the learning rate for a matrix [fan_out, fan_in].  The names are those of Megatron's
# --muon-scale-mode (Emerging-Optimizers, get_muon_scale_factor).
SCALES: dict[str, Callable[[int, int], float]] = {
    "shape_scaling": lambda fan_out, fan_in: math.sqrt(max(1.0, fan_out / fan_in)),
    "spectral": lambda fan_out, fan_in: math.sqrt(max(fan_out, fan_in)),
    # Moonlight, arXiv 2502.16982, equation 4.
    "rms_match": lambda fan_out, fan_in: 0.2 * math.sqrt(max(fan_out, fan_in)),
    "unit_rms_norm": lambda fan_out, fan_in: math.sqrt(fan_out / fan_in),
}

# Elements orthogonalized at once.  On a CPU a batch should stay in the cache; on a GPU it should
# fill the device, at about 20 bytes of scratch memory for an element.
_CPU_BATCH_ELEMENTS = 2**19
_CUDA_BATCH_ELEMENTS = 2**28


@dataclass(frozen=True)
class MatrixSplit:
    """How the rows of a fused parameter divide into separate matrices.

    The rows are one or more equal groups; a group is a row block of every matrix, in order.  Matrix
    ``i`` is what the ``i``-th blocks of all groups form together, in the order of the groups.

    Attributes:
        sizes: Rows of each block of one group; on a tensor-parallel rank, of its own rows.
    """

    sizes: tuple[int, ...]


class _Kind(NamedTuple):
    """What matrices of one batch have in common."""

    fan_out: int
    fan_in: int
    weight_dtype: torch.dtype
    device: torch.device


class _Part(NamedTuple):
    """One matrix, or the same matrix of ``experts``, as `RunView` views them."""

    experts: int
    weight: Tensor
    grad: Tensor
    momentum: Tensor
    param: Tensor

    def narrow(self, start: int, count: int) -> "_Part":
        weight, grad, momentum = (view.narrow(0, start, count) for view in self[1:4])
        return _Part(count, weight, grad, momentum, self.param)


@dataclass
class UpdateStatistics:
    """What one step did, measured on this rank.

    Attributes:
        squares: Sum of squares of the update, float64 ``[]``, by ``gradient_group`` of the
            parameters.
        numel: Elements of the update, by group.
        orthogonality_error: `orthogonality_error` of one result; None where this rank owns no
            matrix.
    """

    squares: dict[str, Tensor] = field(default_factory=dict)
    numel: dict[str, int] = field(default_factory=dict)
    orthogonality_error: Tensor | None = None
    _marks: list[Any] = field(default_factory=list)

    def mark(self) -> None:
        """Note the time, at the start and at the end of a part of the step."""
        if not torch.cuda.is_available():
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> float:
        """Time between the marks, in pairs; waits for the device."""
        total = 0.0
        for start, stop in zip(self._marks[::2], self._marks[1::2], strict=True):
            if isinstance(start, float):
                total += stop - start
            else:
                stop.synchronize()
                total += start.elapsed_time(stop) / 1e3
        return total

    def add(self, group: str, update: Tensor, factor: float) -> None:
        """Take a part of the update into account.

        Args:
            group: The part of the model it belongs to.
            update: Orthogonalized, any shape.
            factor: What it is multiplied with: learning rate and scale.
        """
        square = sum_of_squares(update) * factor**2
        self.squares[group] = self.squares[group] + square if group in self.squares else square
        self.numel[group] = self.numel.get(group, 0) + update.numel()


def orthogonality_error(matrix: Tensor) -> Tensor:
    """``|X X^T - I|_F / sqrt(m)`` on the short side m: the RMS distance of the squared singular
    values from 1.

    Args:
        matrix: ``[rows, columns]``, floating.

    Returns:
        float32 ``[]``.
    """
    x = matrix.float()
    x = x.mT if x.shape[0] > x.shape[1] else x
    gram = x @ x.mT
    gram.diagonal().sub_(1.0)
    return torch.linalg.vector_norm(gram) / math.sqrt(len(gram))


class Muon(torch.optim.Optimizer):
    """Muon with fused, stacked and tensor-parallel parameters.

    For every separate matrix, with momentum M, gradient G and learning rate lr:

        M <- momentum M + (1 - momentum) G
        U  = M, with Nesterov (1 - momentum) G + momentum M
        p <- (1 - lr weight_decay) p - lr scale(fan_out, fan_in) orthogonalize(U)

    Matrices of one shape are orthogonalized together, across parameters.  A stack ``[E, out, in]``
    is E matrices.  A matrix divided over ranks has one owner, which gets its parts, orthogonalizes
    the whole and sends the parts of the result back, while all ranks work on what they hold alone.

    The state is ``momentum_buffer``, of the parameter's shape, and nothing else: Megatron's
    distributed checkpoint shards it like the parameter.

    Args:
        params: Parameters or groups of them, each 2-D ``[out, in]`` or 3-D ``[E, out, in]``.
        lr: Learning rate; of every group, like ``momentum`` and ``weight_decay``.
        momentum: Factor of the old momentum, from 0 to below 1.
        nesterov: Look one step ahead.
        weight_decay: Decoupled weight decay, multiplied with lr but not with the scale.
        scale: "shape_scaling" (sqrt(max(1, fan_out / fan_in)), the report's), "spectral"
            (sqrt(max(fan_out, fan_in))), "rms_match" (0.2 sqrt(max(fan_out, fan_in)): the size of
            AdamW's updates) or "unit_rms_norm" (sqrt(fan_out / fan_in)); fan_out and fan_in are of
            the separate, whole matrix.
        extra_scale_factor: Multiplied with the scale.
        num_ns_steps: Newton-Schulz steps.
        coefficients: Their coefficients, a name of `newton_schulz.COEFFICIENTS`.
        eps: Smallest Frobenius norm that is divided by.
        dtype: What Newton-Schulz computes in; default bfloat16 on CUDA, float32 on CPU.
        momentum_dtype: What the momentum is kept in, float32 or bfloat16.
        tp_group: Tensor-parallel group; None stands for one rank.
        expert_tp_group: The same for routed experts.
        batch_elements: Elements orthogonalized at once, at least one matrix; default 2**28 on CUDA,
            2**19 on CPU.

    Raises:
        ValueError: An argument is out of its range, or a parameter is neither 2-D nor 3-D.

    Source: Trinity report section 3.4.2, equation 41; order of the decay as in the Dion repository,
        muon.py.  Its momentum is not damped by 1 - momentum, which orthogonalization does not see;
        damped, every rounding is that of torch.optim.Muon and of Emerging-Optimizers.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = False,
        weight_decay: float = 0.01,
        scale: str = "shape_scaling",
        extra_scale_factor: float = 1.0,
        num_ns_steps: int = 5,
        coefficients: str = "dion",
        eps: float = 1e-7,
        dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype = torch.float32,
        tp_group: ProcessGroup | None = None,
        expert_tp_group: ProcessGroup | None = None,
        batch_elements: int | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0.0:
                raise ValueError(f"{name}={value}: must not be negative")
        if momentum >= 1.0:
            raise ValueError(f"momentum={momentum}: must be below 1")
        if scale not in SCALES:
            raise ValueError(f"scale={scale!r} is not known; choose one of {sorted(SCALES)}")
        if momentum_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"momentum_dtype={momentum_dtype}: take float32 or bfloat16")
        coefficient_schedule(coefficients, num_ns_steps)  # refuses what it does not know
        self._plans: list[_Plan] | None = None
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.nesterov = nesterov
        self.scale = scale
        self.extra_scale_factor = extra_scale_factor
        self.dtype = dtype
        self.momentum_dtype = momentum_dtype
        self.statistics: UpdateStatistics | None = None
        self.placements: list[Placement] = []
        self._team: tuple[Muon, ...] = (self,)
        self._pending: tuple[dict[Tensor, dict[str, Any]], list[Round], Sent | None] | None = None
        self._newton_schulz = partial(
            orthogonalize, steps=num_ns_steps, coefficients=coefficients, eps=eps, dtype=dtype
        )
        self.tp_group = tp_group
        self.expert_tp_group = expert_tp_group
        self.batch_elements = batch_elements

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The loss of ``closure``, if there is one.

        Raises:
            ValueError: The attributes of a parameter contradict its shape, or a parameter divided
                over ranks has no gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self is self._team[0]:
            # All of the team at once: their ranks are balanced over the sum of their work.
            for muon in self._team:
                muon._begin()
            for muon in self._team:
                muon._finish()
        return loss

    def step_together(self, others: Sequence["Muon"]) -> None:
        """Let this optimizer's `step` step others too, whose own then does nothing.

        What ranks wait for comes after the work that they do alone, of all of them.

        Args:
            others: Optimizers of other parameters.
        """
        for muon in (self, *others):
            muon._team = (self, *others)

    def _begin(self) -> None:
        """Send what travels, and do what does not."""
        if self.statistics is not None:
            self.statistics.mark()
        settings: dict[Tensor, dict[str, Any]] = {}
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            settings.update(dict.fromkeys(params, group))
            self._update_momentum(params, group["momentum"])
            if group["weight_decay"] != 0.0 and params:
                torch._foreach_mul_(params, 1.0 - float(group["lr"]) * group["weight_decay"])
        if self._plans is None:
            self._plans = self._make_plans()
        rounds = [part for plan in self._plans for part in plan.rounds]
        sent = rounds[0].send(partial(self._read, rounds[0], settings)) if rounds else None
        self._update_local(settings)
        self._pending = settings, rounds, sent
        if self.statistics is not None:
            self.statistics.mark()

    def _finish(self) -> None:
        """Orthogonalize what came, and apply what comes back."""
        assert self._pending is not None
        (settings, rounds, sent), self._pending = self._pending, None
        if self.statistics is not None:
            self.statistics.mark()
        for number, current in enumerate(rounds):
            assert sent is not None
            matrices = current.receive(sent)
            if number + 1 < len(rounds):
                later = rounds[number + 1]
                sent = later.send(partial(self._read, later, settings))
            self._update_cut(current, matrices, settings)
        if self.statistics is not None:
            self.statistics.mark()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: As torch takes it.

        Raises:
            ValueError: A parameter is neither 2-D nor 3-D, or `place` has placed all of them.
        """
        if getattr(self, "placements", None):
            raise ValueError("Muon's parameters are placed on ranks; no group can be added")
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dim() not in (2, 3):
                self.param_groups.pop()
                raise ValueError(
                    f"Muon got a parameter of shape {tuple(param.shape)}: it takes matrices "
                    "[out, in] and stacks [E, out, in]; give the others to AdamW"
                )
        self._plans = None

    def __getstate__(self) -> dict[str, Any]:
        """All but the plans, which follow from the rest; torch would keep the state only."""
        return {**self.__dict__, "_plans": None, "_team": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._team = (self,)

    def init_state(self) -> None:
        """Make the state of every parameter, also of those without a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                self._momentum(param)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the momentum keeps its dtype whatever that of the parameter is.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: The groups do not match.
        """
        super().load_state_dict(state_dict)
        # torch casts every state tensor to the dtype of its parameter.
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, own, strict=True):
            if index in state_dict["state"]:
                momentum = state_dict["state"][index]["momentum_buffer"]
                state = {"momentum_buffer": momentum.to(param.device, self.momentum_dtype)}
                self.state[param] = state
        for group in self.param_groups:
            group.pop("step", None)  # Megatron's distributed optimizer adds Adam's

    def place(self, placements: list[Placement]) -> None:
        """Say how the parameters lie on the ranks; without it, each is whole on its TP group.

        Args:
            placements: Every parameter of this optimizer in one of them, the same on all ranks of
                its group; ``tensors`` are those of ``param_groups``.
        """
        self.placements, self._plans = placements, None

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, dtype=self.momentum_dtype)
        return state["momentum_buffer"]

    def _update_momentum(self, params: list[Tensor], factor: float) -> None:
        if not params:
            return
        momenta = [self._momentum(param) for param in params]
        gradients = [_gradient(param) for param in params]
        if all(m.dtype == g.dtype for m, g in zip(momenta, gradients, strict=True)):
            torch._foreach_lerp_(momenta, gradients, 1.0 - factor)
            return
        for momentum, gradient in zip(momenta, gradients, strict=True):  # one rounding, not two
            momentum.copy_(_lerp(momentum, gradient, 1.0 - factor))

    def _make_plans(self) -> list["_Plan"]:
        placements = self.placements or list(self._default_placements())
        plans = []
        for placement in placements:
            runs, cuts = plan_runs(placement)
            dtype = self._compute_dtype(placement.device, torch.float32)
            stacks, starts = placement.stacks, placement.starts
            views = [RunView(stacks[run.stack], starts[run.stack], run) for run in runs]
            plans.append(_Plan(placement, views, plan_rounds(placement, cuts, dtype)))
        return plans

    def _default_placements(self) -> Iterator[Placement]:
        """Yield placements of whole parameters: alone, on the TP group, on that of experts."""
        params = [param for group in self.param_groups for param in group["params"]]
        by_group: dict[ProcessGroup | None, list[Tensor]] = defaultdict(list)
        for param in params:
            expert = getattr(param, "expert_tp", False) or not getattr(param, "allreduce", True)
            group = self.expert_tp_group if expert else self.tp_group
            alone = group is None or torch.distributed.get_world_size(group) == 1
            by_group[None if alone else group].append(param)
        for group, members in by_group.items():
            ranks = 1 if group is None else torch.distributed.get_world_size(group)
            numbers = [
                [(Shard(rank, 0, param.numel()),) for rank in range(ranks)] for param in members
            ]
            stacks = [
                make_stack(p, p.shape, holders) for p, holders in zip(members, numbers, strict=True)
            ]
            yield Placement(
                stacks,
                list(members),
                assign_dense(list_matrices(stacks), np.zeros(ranks)),
                members[0].device,
                group,
                0 if group is None else torch.distributed.get_rank(group),
            )

    def _update_local(self, settings: dict[Tensor, dict[str, Any]]) -> None:
        kinds: dict[_Kind, list[_Part]] = defaultdict(list)
        for placement, views, _ in self._plans or ():
            for view in views:
                param = placement.tensors[view.run.stack]
                if param is None or param not in settings:
                    continue
                kinds[_Kind(*view.kind, param.dtype, param.device)].append(
                    _Part(
                        view.run.experts,
                        view(param),
                        view(_gradient(param)),
                        view(self._momentum(param)),
                        param,
                    )
                )
        for kind, parts in kinds.items():
            for batch in _batches(parts, self._batch_count(kind)):
                self._update_batch(batch, kind, settings)

    def _batch_count(self, kind: _Kind) -> int:
        default = _CUDA_BATCH_ELEMENTS if kind.device.type == "cuda" else _CPU_BATCH_ELEMENTS
        elements = self.batch_elements or default
        return max(1, elements // max(1, kind.fan_out * kind.fan_in))

    def _update_batch(
        self, batch: list[_Part], kind: _Kind, settings: dict[Tensor, dict[str, Any]]
    ) -> None:
        counts = [part.experts for part in batch]
        stacked = self._stack_directions(batch, counts, kind, settings)
        update = self._newton_schulz(stacked)
        if update.is_cuda:  # where another dtype would be added matrix by matrix
            update = update.to(kind.weight_dtype)
        self._measure(update)
        updates = [
            rows.view(part.weight.shape)
            for rows, part in zip(update.split(counts), batch, strict=True)
        ]
        by_rate: dict[float, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for part, found in zip(batch, updates, strict=True):
            factor = self._factor(part.param, (kind.fan_out, kind.fan_in), settings)
            self._measure_update(part.param, found, factor)
            by_rate[factor][0].append(part.weight)
            by_rate[factor][1].append(found)
        for factor, (weights, found_updates) in by_rate.items():
            torch._foreach_add_(weights, found_updates, alpha=-factor)

    def _stack_directions(
        self,
        batch: list[_Part],
        counts: list[int],
        kind: _Kind,
        settings: dict[Tensor, dict[str, Any]],
    ) -> Tensor:
        """What is to be orthogonalized, ``[count, fan_out, fan_in]`` in the dtype computed in."""
        gradients = [part.grad for part in batch]
        momenta = [part.momentum for part in batch]
        dtype = self._compute_dtype(
            kind.device, torch.promote_types(gradients[0].dtype, momenta[0].dtype)
        )
        directions = momenta
        if self.nesterov:
            factors = [settings[part.param]["momentum"] for part in batch]
            directions = _foreach_lerp(gradients, momenta, factors)
        if len(batch) == 1:
            return directions[0].reshape(counts[0], kind.fan_out, kind.fan_in).to(dtype)
        stacked = torch.empty(
            sum(counts), kind.fan_out, kind.fan_in, dtype=dtype, device=kind.device
        )
        targets = [
            rows.view(direction.shape)
            for rows, direction in zip(stacked.split(counts), directions, strict=True)
        ]
        torch._foreach_copy_(targets, directions)
        return stacked

    def _read(self, current: Round, settings: dict[Tensor, dict[str, Any]], number: int) -> Tensor:
        """This rank's part of the direction of a stack, flat."""
        param = current.placement.tensors[number]
        if param is None or param not in settings:
            raise ValueError(
                f"a parameter of {current.placement.stacks[number].count} x "
                f"{current.placement.stacks[number].shape(0)} is divided over ranks and has no "
                "gradient on this one; every rank must have it in every step, of zeros if need be"
            )
        factor = settings[param]["momentum"]
        return self._direction(_gradient(param), self._momentum(param), factor).reshape(-1)

    def _direction(self, grad: Tensor, momentum: Tensor, factor: float) -> Tensor:
        return _lerp(grad, momentum, factor) if self.nesterov else momentum

    def _update_cut(
        self, current: Round, matrices: list[Tensor], settings: dict[Tensor, dict[str, Any]]
    ) -> None:
        results: list[Tensor | None] = [None] * len(matrices)
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for number, matrix in enumerate(matrices):
            by_shape[matrix.shape].append(number)
        for shape, numbers in by_shape.items():
            kind = _Kind(shape[0], shape[1], current.dtype, current.placement.device)
            limit = self._batch_count(kind)
            for start in range(0, len(numbers), limit):
                some = numbers[start : start + limit]
                update = self._newton_schulz(torch.stack([matrices[n] for n in some]))
                self._measure(update)
                for number, result in zip(some, update, strict=True):
                    results[number] = result
        sent = current.send_back([result for result in results if result is not None])
        weights: dict[float, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for number, offset, values, shape_of in current.receive_back(sent):
            param = current.placement.tensors[number]
            assert param is not None
            factor = self._factor(param, shape_of, settings)
            self._measure_update(param, values, factor)
            weights[factor][0].append(param.view(-1)[offset : offset + len(values)])
            weights[factor][1].append(values)
        for factor, (targets, values_of) in weights.items():
            torch._foreach_add_(targets, values_of, alpha=-factor)

    def _factor(
        self, param: Tensor, shape: tuple[int, int], settings: dict[Tensor, dict[str, Any]]
    ) -> float:
        scale = SCALES[self.scale](*shape) * self.extra_scale_factor
        return float(settings[param]["lr"]) * scale

    def _compute_dtype(self, device: torch.device, own: torch.dtype) -> torch.dtype:
        return self.dtype or (torch.bfloat16 if device.type == "cuda" else own)

    def _measure(self, orthogonalized: Tensor) -> None:
        if self.statistics is not None and self.statistics.orthogonality_error is None:
            self.statistics.orthogonality_error = orthogonality_error(orthogonalized[0])

    def _measure_update(self, param: Tensor, update: Tensor, factor: float) -> None:
        if self.statistics is not None:
            self.statistics.add(getattr(param, "gradient_group", None) or "all", update, factor)


class _Plan(NamedTuple):
    placement: Placement
    views: list[RunView]
    rounds: list[Round]


def make_stack(param: Tensor, shape: Sequence[int], holders: Sequence[tuple[Shard, ...]]) -> Stack:
    """Describe the matrices of a parameter and who holds them.

    Args:
        param: The parameter or a shard of it, with its attributes.
        shape: Shape of its tensor-parallel part, ``[out, in]`` or ``[E, out, in]``.
        holders: For each tensor-parallel rank, who holds which elements.

    Raises:
        ValueError: The attributes contradict the shape.
    """
    count, rows, columns = (1, *shape) if len(shape) == 2 else shape
    split = getattr(param, "muon_split", None) or MatrixSplit((rows,))
    if rows % sum(split.sizes):
        raise ValueError(
            f"muon_split={split.sizes}: a parameter of shape {tuple(shape)} does not hold a whole "
            f"number of groups of {sum(split.sizes)} rows"
        )
    shard_dim = None
    if getattr(param, "tensor_model_parallel", False) and len(holders) > 1:
        # Of the matrix: 0 rows, 1 columns; the stack's own dimension is never divided by TP.
        shard_dim = param.partition_dim - (len(shape) - 2)  # type: ignore[attr-defined]
        if shard_dim not in (0, 1):
            raise ValueError(
                f"partition_dim={param.partition_dim} of a tensor-parallel parameter of shape "  # type: ignore[attr-defined]
                f"{tuple(shape)} does not name its rows or columns"
            )
        if getattr(param, "partition_stride", 1) > 1 and getattr(param, "muon_split", None) is None:
            raise ValueError(
                f"a tensor-parallel parameter of shape {tuple(shape)} holds "
                f"{param.partition_stride} matrices (partition_stride) but has no muon_split; "  # type: ignore[attr-defined]
                "see attach_muon_splits()"
            )
    return Stack(count, rows, columns, split.sizes, shard_dim, tuple(holders))


def _lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """``start + weight (end - start)`` in the more precise dtype of the two."""
    dtype = torch.promote_types(start.dtype, end.dtype)
    return torch.lerp(start.to(dtype), end.to(dtype), weight)


def _foreach_lerp(starts: list[Tensor], ends: list[Tensor], weights: list[float]) -> list[Tensor]:
    """`_lerp` of each."""
    if all(start.dtype == end.dtype for start, end in zip(starts, ends, strict=True)):
        return list(torch._foreach_lerp(starts, ends, weights))
    return [_lerp(*each) for each in zip(starts, ends, weights, strict=True)]


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def _batches(parts: list[_Part], limit: int) -> Iterator[list[_Part]]:
    """Yield the parts in batches of at most ``limit`` matrices, cutting stacks where needed."""
    batch: list[_Part] = []
    room = limit
    for part in parts:
        start, count = 0, part.experts
        while start < count:
            take = min(room, count - start)
            batch.append(part if take == part.experts else part.narrow(start, take))
            start, room = start + take, room - take
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch
