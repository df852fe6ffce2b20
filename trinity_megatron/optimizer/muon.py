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
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from trinity_megatron.optimizer.newton_schulz import coefficient_schedule, orthogonalize

# Factor of the learning rate for a matrix [fan_out, fan_in].  The names are those of Megatron's
# --muon-scale-mode (Emerging-Optimizers, get_muon_scale_factor).
SCALES: dict[str, Callable[[int, int], float]] = {
    "shape_scaling": lambda fan_out, fan_in: math.sqrt(max(1.0, fan_out / fan_in)),
    "spectral": lambda fan_out, fan_in: math.sqrt(max(fan_out, fan_in)),
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

    def blocks(self, tensor: Tensor) -> list[Tensor]:
        """Return views of the separate matrices.

        Args:
            tensor: ``[rows, columns]`` or a stack ``[count, rows, columns]``.

        Returns:
            One ``[count, groups, size, columns]`` for each of ``sizes`` (count 1 without a stack).

        Raises:
            ValueError: The rows are not a whole number of groups.
        """
        rows = tensor.shape[-2]
        if rows % sum(self.sizes):
            raise ValueError(
                f"muon_split={self.sizes}: a parameter of shape {tuple(tensor.shape)} does not "
                f"hold a whole number of groups of {sum(self.sizes)} rows"
            )
        stack = tensor if tensor.dim() == 3 else tensor.unsqueeze(0)
        grouped = stack.unflatten(1, (rows // sum(self.sizes), sum(self.sizes)))
        return list(grouped.split(self.sizes, dim=2))


class _Kind(NamedTuple):
    """What matrices of one batch have in common: their whole shape and how they are divided."""

    fan_out: int
    fan_in: int
    shard_dim: int | None  # 0: rows, 1: columns
    group: ProcessGroup | None
    weight_dtype: torch.dtype
    device: torch.device


class _Part(NamedTuple):
    """One matrix, or the same matrix of a stack, as views ``[count, groups, size, columns]``."""

    weight: Tensor
    grad: Tensor
    momentum: Tensor

    def narrow(self, start: int, count: int) -> "_Part":
        return _Part(*(view.narrow(0, start, count) for view in self))


class Muon(torch.optim.Optimizer):
    """Muon with fused, stacked and tensor-parallel parameters.

    For every separate matrix, with momentum M, gradient G and learning rate lr:

        M <- momentum M + G
        U  = M, with Nesterov momentum G + momentum M
        p <- (1 - lr weight_decay) p - lr scale(fan_out, fan_in) orthogonalize(U)

    Matrices of one shape are orthogonalized together, across parameters.  Matrices divided over a
    tensor-parallel group are gathered, one collective for a batch, and every rank keeps its part of
    the whole result.  A stack ``[E, out, in]`` is E matrices.

    The state is ``momentum_buffer``, float32 and of the parameter's shape, and nothing else:
    Megatron's distributed checkpoint shards it like the parameter.

    Args:
        params: Parameters or groups of them, each 2-D ``[out, in]`` or 3-D ``[E, out, in]``.
        lr: Learning rate; of every group, like ``momentum`` and ``weight_decay``.
        momentum: Factor of the old momentum.  The gradient is not damped by 1 - momentum.
        nesterov: Look one step ahead.
        weight_decay: Decoupled weight decay, multiplied with lr but not with the scale.
        scale: "shape_scaling" (sqrt(max(1, fan_out / fan_in)), the report's), "spectral"
            (sqrt(max(fan_out, fan_in))) or "unit_rms_norm" (sqrt(fan_out / fan_in)); fan_out and
            fan_in are of the separate, whole matrix.
        extra_scale_factor: Multiplied with the scale.
        num_ns_steps: Newton-Schulz steps.
        coefficients: Their coefficients, a name of `newton_schulz.COEFFICIENTS`.
        eps: Smallest Frobenius norm that is divided by.
        dtype: What Newton-Schulz computes in; default bfloat16 on CUDA, float32 on CPU.
        tp_group: Tensor-parallel group; None stands for one rank.
        expert_tp_group: The same for routed experts.
        batch_elements: Elements orthogonalized at once, at least one matrix; default 2**28 on CUDA,
            2**19 on CPU.

    Raises:
        ValueError: An argument is out of its range, or a parameter is neither 2-D nor 3-D.

    Source: Trinity report section 3.4.2, equation 41; momentum and order of the decay as in the
        Dion repository, muon.py.
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
        tp_group: ProcessGroup | None = None,
        expert_tp_group: ProcessGroup | None = None,
        batch_elements: int | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0.0:
                raise ValueError(f"{name}={value}: must not be negative")
        if scale not in SCALES:
            raise ValueError(f"scale={scale!r} is not known; choose one of {sorted(SCALES)}")
        coefficient_schedule(coefficients, num_ns_steps)  # refuses what it does not know
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for param in group["params"]:
                if param.dim() not in (2, 3):
                    raise ValueError(
                        f"Muon got a parameter of shape {tuple(param.shape)}: it takes matrices "
                        "[out, in] and stacks [E, out, in]; give the others to AdamW"
                    )
        self.nesterov = nesterov
        self.scale = scale
        self.extra_scale_factor = extra_scale_factor
        self.dtype = dtype
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
            ValueError: The attributes of a parameter contradict its shape.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            self._update_momentum(params, group["momentum"])
            kinds: dict[_Kind, list[_Part]] = defaultdict(list)
            for param in params:
                for kind, part in self._parts(param):
                    kinds[kind].append(part)
            for kind, parts in kinds.items():
                for batch in _batches(parts, self._batch_count(kind)):
                    self._update_batch(batch, kind, group)
        return loss

    def init_state(self) -> None:
        """Make the state of every parameter, also of those without a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                self._momentum(param)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the momentum stays float32 where a parameter is not.

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
            if param.dtype != torch.float32 and index in state_dict["state"]:
                momentum = state_dict["state"][index]["momentum_buffer"]
                self.state[param]["momentum_buffer"] = momentum.to(param.device, torch.float32)

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, dtype=torch.float32)
        return state["momentum_buffer"]

    def _update_momentum(self, params: list[Tensor], factor: float) -> None:
        if not params:
            return
        momenta = [self._momentum(param) for param in params]
        torch._foreach_mul_(momenta, factor)
        torch._foreach_add_(momenta, [_gradient(param) for param in params])

    def _parts(self, param: Tensor) -> Iterator[tuple[_Kind, _Part]]:
        shard_dim, group = self._sharding(param)
        split = getattr(param, "muon_split", None) or MatrixSplit((param.shape[-2],))
        views = (split.blocks(t) for t in (param, _gradient(param), self._momentum(param)))
        for part in map(_Part, *views):
            _, groups, size, columns = part.weight.shape
            whole = [groups * size, columns]
            if shard_dim is not None:
                whole[shard_dim] *= torch.distributed.get_world_size(group)
            yield _Kind(whole[0], whole[1], shard_dim, group, param.dtype, param.device), part

    def _sharding(self, param: Tensor) -> tuple[int | None, ProcessGroup | None]:
        expert = getattr(param, "expert_tp", False) or not getattr(param, "allreduce", True)
        group = self.expert_tp_group if expert else self.tp_group
        divided = getattr(param, "tensor_model_parallel", False)
        if not divided or group is None or torch.distributed.get_world_size(group) == 1:
            return None, None
        # Of the matrix: 0 rows, 1 columns; the stack's own dimension is never divided by TP.
        shard_dim = param.partition_dim - (param.dim() - 2)  # type: ignore[attr-defined]
        if shard_dim not in (0, 1):
            raise ValueError(
                f"partition_dim={param.partition_dim} of a tensor-parallel parameter of shape "  # type: ignore[attr-defined]
                f"{tuple(param.shape)} does not name its rows or columns"
            )
        stride = getattr(param, "partition_stride", 1)
        if stride > 1 and getattr(param, "muon_split", None) is None:
            raise ValueError(
                f"a tensor-parallel parameter of shape {tuple(param.shape)} holds {stride} "
                "matrices (partition_stride) but has no muon_split; see attach_muon_splits()"
            )
        return shard_dim, group

    def _batch_count(self, kind: _Kind) -> int:
        default = _CUDA_BATCH_ELEMENTS if kind.device.type == "cuda" else _CPU_BATCH_ELEMENTS
        elements = self.batch_elements or default
        return max(1, elements // max(1, kind.fan_out * kind.fan_in))

    def _update_batch(self, batch: list[_Part], kind: _Kind, group: dict[str, Any]) -> None:
        if self.nesterov:
            blocks = [torch.add(p.grad, p.momentum, alpha=group["momentum"]) for p in batch]
        else:
            blocks = [part.momentum for part in batch]
        matrices = [block.flatten(1, 2) for block in blocks]
        stacked = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        update = self._orthogonalize(stacked, kind)
        updates = [
            rows.unflatten(1, part.weight.shape[1:3])
            for rows, part in zip(update.split([len(p.weight) for p in batch]), batch, strict=True)
        ]
        weights = [part.weight for part in batch]
        factor = SCALES[self.scale](kind.fan_out, kind.fan_in) * self.extra_scale_factor
        if group["weight_decay"] != 0.0:
            torch._foreach_mul_(weights, 1.0 - float(group["lr"]) * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-float(group["lr"]) * factor)

    def _orthogonalize(self, matrices: Tensor, kind: _Kind) -> Tensor:
        """Orthogonalize ``[count, rows, columns]`` as parts of whole matrices."""
        if kind.shard_dim is None:
            return self._newton_schulz(matrices)
        dim, ranks = 1 + kind.shard_dim, torch.distributed.get_world_size(kind.group)
        # Send what is computed in: half the bytes where that is bfloat16.
        dtype = self.dtype or (torch.bfloat16 if matrices.is_cuda else matrices.dtype)
        local = matrices.to(dtype).contiguous()
        gathered = local.new_empty(ranks * len(local), *local.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, local, group=kind.group)
        whole = torch.cat(gathered.chunk(ranks), dim=dim)
        return self._newton_schulz(whole).chunk(ranks, dim)[torch.distributed.get_rank(kind.group)]


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def _batches(parts: list[_Part], limit: int) -> Iterator[list[_Part]]:
    """Yield the parts in batches of at most ``limit`` matrices, cutting stacks where needed."""
    batch: list[_Part] = []
    room = limit
    for part in parts:
        start, count = 0, len(part.weight)
        while start < count:
            take = min(room, count - start)
            batch.append(part.narrow(start, take))
            start, room = start + take, room - take
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch
