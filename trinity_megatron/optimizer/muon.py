"""Muon: momentum, orthogonalized matrix by matrix.

Usable alone, on any torch model; `optimizer/register.py` puts it into Megatron.  Attributes of a
parameter describe its matrices; all of them are optional, and all but the first Megatron's own:

* ``muon_split``: a `MatrixSplit`, for a parameter that holds several matrices;
* ``tensor_model_parallel``, ``partition_dim``: the dimension of the parameter that is divided over
  the tensor-parallel group: 0 rows or 1 columns, for a stack of experts ``[E, out, in]`` 1 or 2;
* ``expert_tp`` True or ``allreduce`` False: a routed expert, with a tensor-parallel group of its
  own.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from trinity_megatron.optimizer.matrix_split import MatrixSplit, make_stack
from trinity_megatron.optimizer.newton_schulz import coefficient_schedule, orthogonalize
from trinity_megatron.optimizer.sharded.matrix_placement import (
    MatrixPlacement,
    place_whole_parameters,
)
from trinity_megatron.optimizer.sharded.matrix_update import MatrixUpdate, UpdatePlan, plan_update
from trinity_megatron.optimizer.update_rule import ParameterStep, UpdateRule, update_momenta
from trinity_megatron.optimizer.update_statistics import UpdateStatistics, orthogonality_error

__all__ = [
    "SCALES",
    "MatrixSplit",
    "Muon",
    "UpdateStatistics",
    "make_stack",
    "orthogonality_error",
]

# Factor of the learning rate for a matrix [fan_out, fan_in].  The names are those of Megatron's
# --muon-scale-mode (Emerging-Optimizers, get_muon_scale_factor).
SCALES: dict[str, Callable[[int, int], float]] = {
    "shape_scaling": lambda fan_out, fan_in: math.sqrt(max(1.0, fan_out / fan_in)),
    "spectral": lambda fan_out, fan_in: math.sqrt(max(fan_out, fan_in)),
    # Moonlight, arXiv 2502.16982, equation 4.
    "rms_match": lambda fan_out, fan_in: 0.2 * math.sqrt(max(fan_out, fan_in)),
    "unit_rms_norm": lambda fan_out, fan_in: math.sqrt(fan_out / fan_in),
}


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
        self.placements: list[MatrixPlacement] = []
        self._plans: list[UpdatePlan] | None = None
        self._started: MatrixUpdate | None = None
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.nesterov = nesterov
        self.scale = scale
        self.extra_scale_factor = extra_scale_factor
        self.dtype = dtype
        self.momentum_dtype = momentum_dtype
        self.tp_group = tp_group
        self.expert_tp_group = expert_tp_group
        self.batch_elements = batch_elements
        self.statistics: UpdateStatistics | None = None
        self._newton_schulz = partial(
            orthogonalize, steps=num_ns_steps, coefficients=coefficients, eps=eps, dtype=dtype
        )

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
        if self._started is None:
            self.start_step()
        update, self._started = self._started, None
        assert update is not None
        with self._timed():
            update.finish()
        return loss

    @torch.no_grad()
    def start_step(self) -> None:
        """Do the first half of the next `step`, which then does the second half only.

        The first half waits for no other rank: it updates momenta and all matrices that this rank
        holds whole, and sends the others.  A `MuonCoordinator` calls it for several optimizers
        before any of them waits.

        Raises:
            ValueError: As `step`.
        """
        assert self._started is None, "the step before has been started and not finished"
        with self._timed():
            steps = self._update_momenta()
            rule = self._make_rule()
            if self._plans is None:
                self._plans = [plan_update(each, rule) for each in self._get_placements()]
            update = MatrixUpdate(self._plans, rule, steps, self.statistics)
            update.start()
        self._started = update

    def _update_momenta(self) -> dict[Tensor, ParameterStep]:
        """Update momenta and decay weights of every parameter that has a gradient."""
        steps: dict[Tensor, ParameterStep] = {}
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            momenta = [self._momentum(param) for param in params]
            gradients = [param.grad for param in params]
            factor, learning_rate = group["momentum"], float(group["lr"])
            update_momenta(momenta, gradients, factor)
            if group["weight_decay"] != 0.0:
                torch._foreach_mul_(params, 1.0 - learning_rate * group["weight_decay"])
            for param, gradient, momentum in zip(params, gradients, momenta, strict=True):
                steps[param] = ParameterStep(gradient, momentum, factor, learning_rate)
        return steps

    def _make_rule(self) -> UpdateRule:
        scale = SCALES[self.scale]
        return UpdateRule(
            orthogonalize=self._newton_schulz,
            scale=lambda fan_out, fan_in: scale(fan_out, fan_in) * self.extra_scale_factor,
            nesterov=self.nesterov,
            dtype=self.dtype,
            batch_elements=self.batch_elements,
        )

    def _get_placements(self) -> list[MatrixPlacement]:
        if self.placements:
            return self.placements
        params = [param for group in self.param_groups for param in group["params"]]
        return place_whole_parameters(params, self.tp_group, self.expert_tp_group)

    def _timed(self) -> AbstractContextManager[None]:
        return nullcontext() if self.statistics is None else self.statistics.timed()

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, dtype=self.momentum_dtype)
        return state["momentum_buffer"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: As torch takes it.

        Raises:
            ValueError: A parameter is neither 2-D nor 3-D, or `place` has placed all of them.
        """
        if self.placements:
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
        return {**self.__dict__, "_plans": None, "_started": None}

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

    def place(self, placements: list[MatrixPlacement]) -> None:
        """Set where the matrices are; by default every parameter is whole on its TP group.

        Args:
            placements: Every parameter of this optimizer in one of them, the same on all ranks of
                its group; ``tensors`` are those of ``param_groups``.
        """
        self.placements, self._plans = placements, None
