"""Parameter initialisation that does not depend on the parallel layout."""

import hashlib
import re
from collections.abc import Iterable

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_rank, get_pg_size, unwrap_model

from trinity_megatron.model.config import TrinityConfig

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def initialize_parameters(model: list[MegatronModule]) -> list[MegatronModule]:
    """Draw every matrix from TruncNormal(0, sigma^2) cut at 3 sigma, sigma = 0.5/sqrt(d).

    Each matrix is drawn whole from a generator seeded by ``init_seed`` and its global name, then
    cut to the rank's part: tensor, pipeline, expert and data parallel ranks build one and the same
    model.  Norm gains are set by their layers.  A pre-wrap hook of Megatron's model builders.

    Args:
        model: Unwrapped pipeline chunks of this rank, changed in place.

    Returns:
        ``model``.

    Source: report eq 37-38 and Table 1 ("all trainable parameters").
    """
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if parameter.dim() > 1:
                _initialize(global_name(chunk, name), parameter, chunk)
    return model


def set_matrices_aside(model: list[MegatronModule]) -> list[MegatronModule]:
    """Leave of every matrix its shape alone, until it has its place in the buffers.

    Megatron's distributed optimizer copies the parameters into a buffer of their size and makes one
    for the gradients: with the parameters themselves that is more than a step ever needs.  A
    pre-wrap hook; :func:`initialize_wrapped` has to be a post-wrap hook then.
    """
    for chunk in model:
        set_aside(chunk)
    torch.cuda.empty_cache()  # the buffers are single blocks, and find none that is free
    return model


def set_aside(module: torch.nn.Module) -> None:
    """Leave of every matrix of a module its shape alone."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)


def initialize_wrapped(model: list[MegatronModule]) -> list[MegatronModule]:
    """:func:`initialize_parameters` of a model with Megatron's wrappers around it.

    A wrapper that shards the parameters draws its shards itself.
    """
    for chunk in model:
        if hasattr(chunk, "initialize_shards"):
            chunk.initialize_shards()
        else:
            initialize_parameters(unwrap_model([chunk]))
    return model


def _initialize(name: str, parameter: torch.Tensor, chunk: MegatronModule) -> None:
    draws = ParameterDraws(name, parameter, chunk)
    matrices: Iterable[torch.Tensor] = (parameter.data,)
    if parameter.dim() == 3:
        matrices = parameter.data.unbind(0)
    for index, matrix in enumerate(matrices):
        matrix.copy_(draws.draw(index))


class ParameterDraws:
    """Draws the matrices of a parameter one by one, this rank's tensor-parallel part of each.

    Args:
        name: Global name of the parameter.
        parameter: ``[out, in]``, or ``[E, out, in]`` of routed experts; only its shape, device and
            attributes are read.
        chunk: Unwrapped pipeline chunk that it belongs to.

    Attributes:
        names: Of the matrices, one for each expert.
    """

    def __init__(self, name: str, parameter: torch.Tensor, chunk: MegatronModule) -> None:
        groups = chunk.pg_collection
        is_expert = ".mlp.experts." in name
        self._config: TrinityConfig = chunk.config
        self._like = parameter
        self._group = groups.expt_tp if is_expert else groups.tp
        self._is_sharded = getattr(parameter, "tensor_model_parallel", False)
        self._dim = getattr(parameter, "partition_dim", -1) - (parameter.dim() - 2)
        # [gate | up] is cut in each half (Megatron: stride 2).
        self._stride = 2 if "linear_fc1" in name and self._config.gated_linear_unit else 1
        self.names = [name]
        if is_expert:
            num_local = (self._config.num_moe_experts or 1) // get_pg_size(groups.ep)
            first_expert = get_pg_rank(groups.ep) * num_local
            self.names = [f"{name}.{first_expert + index}" for index in range(num_local)]

    def draw(self, index: int) -> torch.Tensor:
        """Matrix ``index``, fp32 ``[out, in]`` on the device of the parameter."""
        shape = list(self._like.shape[-2:])
        size, rank = get_pg_size(self._group), get_pg_rank(self._group)
        if self._is_sharded:
            shape[self._dim] *= size
        whole = draw_matrix(self.names[index], tuple(shape), self._like, self._config)
        if not self._is_sharded:
            return whole
        parts = whole.chunk(self._stride, dim=self._dim)
        return torch.cat([p.chunk(size, dim=self._dim)[rank] for p in parts], dim=self._dim)


def draw_matrix(
    name: str, shape: tuple[int, ...], like: torch.Tensor, config: TrinityConfig
) -> torch.Tensor:
    """Draw the whole matrix ``name`` in fp32 on the device of ``like``.

    Source: report eq 37-38.
    """
    digest = hashlib.sha256(f"{config.init_seed}/{name}".encode()).digest()
    generator = torch.Generator(device=like.device)
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    whole = torch.empty(shape, dtype=torch.float32, device=like.device)
    sigma = config.initializer_std
    return torch.nn.init.trunc_normal_(
        whole, std=sigma, a=-3 * sigma, b=3 * sigma, generator=generator
    )


def global_name(chunk: MegatronModule, name: str) -> str:
    """Replace the layer's index on this pipeline stage by its index in the model."""

    def renumber(match: re.Match[str]) -> str:
        layer = chunk.decoder.layers[int(match[1])]
        return f"decoder.layers.{layer.layer_number - 1}."

    return _LAYER.sub(renumber, name)
