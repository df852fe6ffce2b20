"""Block FP8: E4M3 numbers with one scale per block of 128 x 128, without any file format.

Source: compressed-tensors, the scheme ``FP8_BLOCK``, which vLLM and SGLang load.
"""

import torch

# Rows and columns of a block.  DeepGEMM has no other.
BLOCK = 128
FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max


def is_quantised(name: str) -> bool:
    """Whether a Hugging Face tensor is stored in FP8.

    The projections of attention (its output gate too), dense MLPs, experts and shared experts are.
    The embedding, the head, the router, the expert bias and the norms are not.
    """
    return name.endswith("_proj.weight")


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the scales of a matrix; blocks at its right and lower edge may be cut off."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantise_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix.

    Args:
        weight: Finite numbers, ``[rows, columns]``.

    Returns:
        E4M3 numbers ``[rows, columns]``, and scales ``[row blocks, column blocks]`` in the dtype of
        the weight: ``numbers * scale`` is the weight again.
    """
    blocks = _pad(weight.float()).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    largest = blocks.abs().amax(dim=(1, 3))
    # The division is in the precision of the weight, as compressed-tensors has it.
    scale = (largest.to(weight.dtype) / _LARGEST).to(weight.dtype)
    # A block of zeros, or of numbers so small that their scale is zero, still needs a divisor.
    scale = torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale)
    # A scale that was rounded down would put the largest numbers beyond E4M3, i.e. at NaN.
    numbers = (blocks / scale.float()[:, None, :, None]).clamp(-_LARGEST, _LARGEST).to(FP8)
    rows, columns = weight.shape
    # Not flatten(): it is not implemented for every dtype of eight bits.
    whole = numbers.reshape(scale.shape[0] * BLOCK, scale.shape[1] * BLOCK)
    return whole[:rows, :columns].contiguous(), scale


def dequantise_blocks(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The matrix that a server computes with.

    Args:
        numbers: E4M3, ``[rows, columns]``.
        scale: ``[row blocks, column blocks]``.

    Returns:
        fp32 ``[rows, columns]``.
    """
    rows, columns = numbers.shape
    spread = scale.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return numbers.float() * spread[:rows, :columns]


def _pad(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    return torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
