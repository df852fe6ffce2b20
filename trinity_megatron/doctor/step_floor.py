"""The least time that a step can take on a GPU, computed from its operations.

Every operation that torch dispatches is counted with the bytes it must read and write and its
FLOPs; what torch has compiled counts as one operation.  Its floor is the larger of bytes over
bandwidth and FLOPs over the rate of its dtype; the floor of a step is the sum, and a share of time
for each launch.  It is computed, not measured: no cache is assumed between two operations, and no
overlap.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from trinity_megatron.upstream.registry import replaced

_ATEN = torch.ops.aten
_RUN_GRAPH = "torch._inductor.output_code:CompiledFxGraph.__call__"


@dataclass(frozen=True)
class Rates:
    """What a GPU can do.  Source: NVIDIA's data sheets, dense rates, SXM.

    Attributes:
        bytes_per_second: Bandwidth of its memory.
        flops: FLOP/s of matrix products by dtype.
        seconds_per_launch: From the end of a small kernel to the start of the next, launches being
            queued in time.
    """

    bytes_per_second: float
    flops: Mapping[torch.dtype, float]
    seconds_per_launch: float = 2e-6


GPUS = {
    "H100": Rates(3.35e12, {torch.bfloat16: 989.4e12, torch.float32: 67e12}),
    "B300": Rates(8e12, {torch.bfloat16: 2.25e15, torch.float32: 77e12}),
}

# The first part that is found in the name of an enclosing module decides, from the innermost on.
_GROUPS = (
    ("norm", "norms"),
    ("core_attention", "attention"),
    ("self_attention", "attention's matrices"),
    ("router", "router"),
    ("shared_experts", "shared experts"),
    ("experts", "experts"),
    ("mlp", "dense layers, dispatch to experts"),
    ("embedding", "embedding"),
    ("decoder", "residual stream"),
)
_HEAD, _OPTIMIZER, _REST = "LM head and loss", "optimizer", "between the passes"


@dataclass
class GroupCost:
    """What the operations of one group take.

    Attributes:
        launches: Kernels.
        num_bytes: Read and written.
        flops: By dtype, in matrix products.
        seconds: Floor without launches, by GPU.
    """

    launches: int = 0
    num_bytes: int = 0
    flops: Counter[torch.dtype] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bound_by_bytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class StepFloor(TorchDispatchMode):
    """Counts what runs while it is entered, by group.

    What is to be compiled must have been so before: run a step or two without it.

    Args:
        attended_keys: Mean number of keys of a query, from the name of the attention's module.
        count_launches: Kernels launched so far, where the device counts them; else each operation
            is one.

    Attributes:
        groups: Costs by name of the group.
    """

    def __init__(
        self,
        attended_keys: Callable[[str], float],
        count_launches: Callable[[], int] | None = None,
    ) -> None:
        super().__init__()
        self.groups: defaultdict[str, GroupCost] = defaultdict(GroupCost)
        self.in_optimizer = False
        self._attended_keys, self._count_launches = attended_keys, count_launches
        self._modules = ModuleTracker()
        self._is_in_graph = self._is_on = False
        self._graphs = ExitStack()

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Else torch would not run what it has compiled."""
        return True

    def __enter__(self) -> StepFloor:
        self._graphs.enter_context(self._modules)
        self._graphs.enter_context(replaced(_RUN_GRAPH, self._counting_graphs))
        self._is_on = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._is_on = False
        self._graphs.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        if self._is_in_graph:
            return func(*args, **kwargs)
        before = self._count_launches() if self._count_launches else 0
        result = func(*args, **kwargs)
        num_bytes = moved_bytes(func, args, kwargs, result)
        if num_bytes == 0:  # a view, or nothing at all
            return result
        launches = self._count_launches() - before if self._count_launches else 1
        flops = operation_flops(func, args, kwargs, result)
        dtype = matrix_dtype(args[1:3] if is_sum_with_product(func) else args)
        self._add(self._innermost(flops > 0), launches, num_bytes, flops, dtype)
        return result

    def _counting_graphs(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(graph: Any, inputs: Sequence[Any]) -> Any:
            given = tensors_in(list(inputs))  # the call empties the list
            flops = self._flex_flops(given) if "flex_attention" in graph.source_code else 0.0
            return self.run_kernels(lambda: call(graph, inputs), given, flops)

        return counted

    def run_kernels(
        self, run: Callable[[], Any], inputs: Iterable[torch.Tensor], flops: float = 0.0
    ) -> Any:
        """Run what torch does not dispatch, as one operation that reads and writes each once.

        Args:
            run: Compiled code, or a kernel of Triton.
            inputs: Tensors that it reads, or writes in place.
            flops: Of matrix products in it.
        """
        if not self._is_on:
            return run()
        num_bytes, dtype = sum(map(size_of, inputs)), matrix_dtype(list(inputs))
        before = self._count_launches() if self._count_launches else 0
        self._is_in_graph = True
        try:
            result = run()
        finally:
            self._is_in_graph = False
        launches = self._count_launches() - before if self._count_launches else 1
        num_bytes += sum(map(size_of, tensors_in(result)))
        self._add(self._innermost(is_product=True), launches, num_bytes, flops, dtype)
        return result

    def _flex_flops(self, inputs: Sequence[torch.Tensor]) -> float:
        """FLOPs of FlexAttention's compiled code, from what it is given."""
        query = max(inputs, key=lambda tensor: tensor.numel() * (tensor.dim() == 4))
        # The backward pass has the output and its gradient beside the query.
        is_backward = sum(tensor.shape == query.shape for tensor in inputs) > 1
        keys = self._attended_keys(self._innermost(is_product=True))
        return attention_flops(query.shape, keys, is_backward)

    def _add(
        self, module: str, launches: int, num_bytes: int, flops: float, dtype: torch.dtype
    ) -> None:
        group = self.groups[_OPTIMIZER if self.in_optimizer else group_of(module)]
        group.launches += launches
        group.num_bytes += num_bytes
        if flops:
            group.flops[dtype] += int(flops)
        for gpu, rates in GPUS.items():
            by_bytes = num_bytes / rates.bytes_per_second
            by_flops = flops / rates.flops.get(dtype, rates.flops[torch.float32])
            group.seconds[gpu] += max(by_bytes, by_flops)
            if by_bytes >= by_flops:
                group.bound_by_bytes[gpu] += by_bytes

    def _innermost(self, is_product: bool) -> str:
        """The longest name of the modules in work; in a backward pass a norm lasts too long."""
        names = self._modules.parents
        named = (name for name in names if not (is_product and "norm" in name))
        return max(named, key=len, default="")


def group_of(module: str) -> str:
    """The group of an operation, from the name of the innermost module it belongs to."""
    if module in ("", "Global"):
        return _REST
    parts = module.split(".")
    for part in reversed(parts):
        for key, group in _GROUPS:
            if key in part:
                return group
    return _HEAD


def moved_bytes(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that an operation reads and writes at least; 0 for a view and for empty memory.

    Args:
        func: The operation.
        args: Its arguments; a tensor that is passed twice counts once.
        kwargs: Its keyword arguments.
        result: What it has returned.
    """
    schema = getattr(func, "_schema", None)
    is_mutable = schema is not None and schema.is_mutable
    inputs = {id(t): t for t in tensors_in((args, kwargs))}
    memory = {t.untyped_storage()._cdata for t in inputs.values()}
    outputs = [t for t in tensors_in(result) if t.untyped_storage()._cdata not in memory]
    if not is_mutable and not outputs:
        return 0  # a view
    if "empty" in str(func):
        return 0
    written = mutated_tensors(func, args, kwargs) if is_mutable else []
    return sum(size_of(t) for t in (*inputs.values(), *outputs, *written))


def mutated_tensors(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors that an operation writes to in place."""
    named = [*zip(func._schema.arguments, args, strict=False)]
    by_name = {argument.name: argument for argument in func._schema.arguments}
    named += [(by_name[name], value) for name, value in kwargs.items() if name in by_name]
    is_written = [(a.alias_info is not None and a.alias_info.is_write, v) for a, v in named]
    return [tensor for is_it, value in is_written if is_it for tensor in tensors_in(value)]


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of the elements that are in memory: an expanded axis is there once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1
    for size, stride in sizes:
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def matrix_dtype(args: Any) -> torch.dtype:
    """The dtype of an operation's first tensor of floating point."""
    found = (t.dtype for t in tensors_in(args) if t.is_floating_point())
    return next(found, torch.float32)


def grouped_mm_flops(a: torch.Tensor, b: torch.Tensor, result: torch.Tensor) -> float:
    """FLOPs of ``[m, k] x [g, k, n]`` -> ``[m, n]`` or ``[m, t] x [t, n]`` -> ``[g, m, n]``.

    Each row, or each column of the inner axis, belongs to one of the groups.
    """
    if a.dim() == 2 and b.dim() == 2:
        return 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
    return 2.0 * result.numel() * a.shape[-1]


def operation_flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """FLOPs of a matrix product; 0 for any other operation."""
    if func is _ATEN._grouped_mm.default:
        return grouped_mm_flops(args[0], args[1], result)
    if is_sum_with_product(func):  # a dtype may follow, which torch's formula takes for a shape
        args, kwargs = args[:3], {}
    formula = flop_registry.get(getattr(func, "overloadpacket", func))
    return float(formula(*args, **kwargs, out_val=result)) if formula else 0.0


def is_sum_with_product(func: Any) -> bool:
    """Whether an operation adds a product to its first argument, which may be of another dtype."""
    return getattr(func, "overloadpacket", None) is _ATEN.addmm


def attention_flops(shape: Sequence[int], keys: float, is_backward: bool) -> float:
    """FLOPs of attention: two products forward, five backward (the scores are made again).

    Args:
        shape: Of the query, batch, heads, queries, size of a head.
        keys: Mean number of keys of a query.
        is_backward: Which pass.
    """
    return 2.0 * (5 if is_backward else 2) * math.prod(shape) * keys


def floor_table(groups: Mapping[str, GroupCost], gpu: str) -> list[tuple[str, ...]]:
    """Rows of a table: group, launches, GB, TFLOP, ms, what binds; the dearest first, then the sum.

    Args:
        groups: From :class:`StepFloor`.
        gpu: A key of ``GPUS``.
    """
    per_launch = GPUS[gpu].seconds_per_launch
    rows = []
    for name, cost in groups.items():
        launching = cost.launches * per_launch
        seconds = cost.seconds[gpu] + launching
        parts = {
            "bandwidth": cost.bound_by_bytes[gpu],
            "products": cost.seconds[gpu] - cost.bound_by_bytes[gpu],
            "launches": launching,
        }
        rows.append((seconds, name, cost, max(parts, key=parts.__getitem__)))
    rows.sort(key=lambda row: -row[0])
    lines = [
        _line(name, cost.launches, cost.num_bytes, sum(cost.flops.values()), seconds, binds)
        for seconds, name, cost, binds in rows
    ]
    costs = [cost for _, _, cost, _ in rows]
    total = _line(
        "step",
        sum(cost.launches for cost in costs),
        sum(cost.num_bytes for cost in costs),
        sum(sum(cost.flops.values()) for cost in costs),
        sum(row[0] for row in rows),
        "",
    )
    return [*lines, total]


def _line(
    name: str, launches: int, num_bytes: int, flops: float, seconds: float, binds: str
) -> tuple[str, ...]:
    cells = (f"{launches:,}", f"{num_bytes / 1e9:.1f}", f"{flops / 1e12:.1f}")
    return (name, *cells, f"{seconds * 1e3:.1f}", binds)
