"""The validation loss of each corpus and language of a mixture, under its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import mpu


def domains_of(mixture: Mapping[str, Any]) -> dict[str, list[int]]:
    """The corpora that each loss is taken over.

    Args:
        mixture: ``args.data_mixture`` of the run.

    Returns:
        Numbers of the corpora by the name of the loss: ``lm loss web`` of a corpus,
        ``lm loss language python`` of all in a language.  No name of a corpus has a space.
    """
    validated = [mixture["corpora"].index(name) for name in mixture["validated"]]
    found = {f"lm loss {mixture['corpora'][number]}": [number] for number in validated}
    for number in validated:
        if language := mixture["languages"][number]:
            found.setdefault(f"lm loss language {language}", []).append(number)
    return found


def sum_by_domain(
    losses: torch.Tensor,
    loss_mask: torch.Tensor,
    corpora: torch.Tensor,
    domains: Mapping[str, list[int]],
) -> dict[str, torch.Tensor]:
    """Sum the losses of a micro-batch over the samples of each domain.

    Args:
        losses: Of each token in nats, fp32, ``[b, s]`` or the same in one row.
        loss_mask: fp32, of the same size.
        corpora: Number of the corpus of each sample, int64 ``[b]``.
        domains: See :func:`domains_of`.

    Returns:
        Summed loss and number of tokens, fp32 ``[2]``, of every domain: 0 where no sample is of it.
    """
    mask = loss_mask.view(len(corpora), -1).float()
    summed = (losses.view(len(corpora), -1).float() * mask).sum(dim=1)
    samples = torch.stack([summed, mask.sum(dim=1)], dim=1)  # [b, 2]
    return {
        name: samples[torch.isin(corpora, torch.tensor(numbers, device=corpora.device))].sum(dim=0)
        for name, numbers in domains.items()
    }


def share_corpora(sample: Mapping[str, torch.Tensor] | None, micro_batch: int) -> torch.Tensor:
    """Give all tensor-parallel ranks the corpora of a micro-batch.

    Args:
        sample: The micro-batch, on tensor-parallel rank 0; None on the others.
        micro_batch: Its samples.

    Returns:
        int64 ``[micro_batch]``.
    """
    device = torch.cuda.current_device()
    if sample is not None:
        corpora = sample["dataset_id"].to(device)
    else:
        corpora = torch.empty(micro_batch, dtype=torch.int64, device=device)
    if mpu.get_tensor_model_parallel_world_size() > 1:
        group = mpu.get_tensor_model_parallel_group()
        torch.distributed.broadcast(corpora, mpu.get_tensor_model_parallel_src_rank(), group)
    return corpora
