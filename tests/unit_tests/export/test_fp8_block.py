"""Block FP8 against a slow reference, and its error against the bound of E4M3."""

import pytest
import torch

from trinity_megatron.export.fp8_block import (
    BLOCK,
    FP8,
    dequantise_blocks,
    is_quantised,
    quantise_blocks,
    scale_shape,
)

SHAPES = [(128, 128), (256, 384), (1, 1), (130, 127), (64, 300), (257, 129)]


def random_weight(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Numbers over six orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (-6 * torch.rand(shape, generator=generator))
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def all_e4m3() -> torch.Tensor:
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    return numbers[numbers.isfinite()].double()


def slow_reference(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Block by block: the nearest of all E4M3 numbers."""
    known = all_e4m3()
    numbers = torch.empty(weight.shape, dtype=torch.float64)
    scales = torch.empty(scale_shape(tuple(weight.shape)), dtype=weight.dtype)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            box = (
                slice(row * BLOCK, (row + 1) * BLOCK),
                slice(column * BLOCK, (column + 1) * BLOCK),
            )
            block = weight[box]
            scale = block.abs().max() / torch.tensor(448.0, dtype=weight.dtype)
            scales[row, column] = scale
            wanted = block.double() / scale.double()
            nearest = (wanted[..., None] - known).abs().argmin(-1)
            numbers[box] = known[nearest]
    return numbers, scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_nearest_number_of_each_block(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_weight(shape, dtype)
    numbers, scale = quantise_blocks(weight)
    expected, scales = slow_reference(weight)
    assert numbers.shape == weight.shape and numbers.dtype == FP8 and numbers.is_contiguous()
    assert scale.dtype == dtype and torch.equal(scale, scales)
    # A tie, or a division in fp32 that falls onto one, may go to the other neighbour.
    same = numbers.double() == expected
    wanted = weight.double() / spread(scale.double(), shape)
    distance = (numbers.double() - wanted).abs() - (expected - wanted).abs()
    assert same.double().mean() > 0.99 and (distance <= 1e-6 * wanted.abs()).all()


def spread(scale: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    rows, columns = (torch.arange(size) // BLOCK for size in shape)
    return scale[rows][:, columns]


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_half_a_step(shape: tuple[int, int]) -> None:
    weight = random_weight(shape, torch.bfloat16)
    numbers, scale = quantise_blocks(weight)
    back = dequantise_blocks(numbers, scale).double()
    step = spread(scale.double(), shape)
    # Three bits of mantissa; below 2**-6 a fixed step of 2**-9; and a scale that was rounded down
    # by one part in 256 cuts the largest number of the block.
    bound = (weight.double().abs() * (2**-4 + 2**-8)).maximum(step * 2**-10)
    assert ((back - weight.double()).abs() <= bound).all()


def test_an_outlier_spoils_only_its_block() -> None:
    weight = random_weight((256, 256), torch.bfloat16) * 1e-3
    numbers, scale = quantise_blocks(weight)
    other = weight.clone()
    other[200, 3] = 1e4
    changed, scales = quantise_blocks(other)
    different = scales != scale
    assert different.nonzero().tolist() == [[1, 0]]
    elsewhere = spread(different, (256, 256)).logical_not()
    assert torch.equal(changed.float()[elsewhere], numbers.float()[elsewhere])


@pytest.mark.parametrize("value", [0.0, 1e-38, 448.0, 3e38])
def test_extreme_blocks_stay_finite(value: float) -> None:
    weight = torch.full((128, 128), value, dtype=torch.bfloat16)
    back = dequantise_blocks(*quantise_blocks(weight))
    assert back.isfinite().all()
    assert (back - weight.float()).abs().max() <= max(2**-8 * value, 1e-4)


def test_what_stays_as_it_is() -> None:
    layer = "model.layers.3."
    assert all(
        is_quantised(layer + name)
        for name in (
            "self_attn.q_proj.weight",
            "self_attn.gate_proj.weight",
            "self_attn.o_proj.weight",
            "mlp.down_proj.weight",
            "mlp.experts.7.up_proj.weight",
            "mlp.shared_experts.gate_proj.weight",
        )
    )
    assert not any(
        map(
            is_quantised,
            (
                "model.embed_tokens.weight",
                "lm_head.weight",
                "model.norm.weight",
                layer + "mlp.router.gate.weight",
                layer + "mlp.expert_bias",
                layer + "self_attn.q_norm.weight",
                layer + "input_layernorm.weight",
            ),
        )
    )
