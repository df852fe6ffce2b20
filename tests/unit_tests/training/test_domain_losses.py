"""Losses by corpus and language against a loop over the samples."""

import pytest
import torch

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from trinity_megatron.training.domain_losses import domains_of, sum_by_domain  # noqa: E402

MIXTURE = {
    "corpora": ["web", "news", "code", "late"],
    "languages": ["english", "english", "python", None],
    "validated": ["web", "code", "news"],
}


def test_the_names() -> None:
    assert domains_of(MIXTURE) == {
        "lm loss web": [0],
        "lm loss code": [2],
        "lm loss news": [1],
        "lm loss language english": [0, 1],
        "lm loss language python": [2],
    }


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_sums(is_packed: bool) -> None:
    losses = torch.rand(6, 16, dtype=torch.float64)
    mask = (torch.rand(6, 16) < 0.8).double()
    corpora = torch.tensor([0, 1, 1, 0, 1, 3])
    shape = (1, -1) if is_packed else (6, 16)  # one row of all sequences
    found = sum_by_domain(
        losses.float().reshape(shape), mask.float().reshape(shape), corpora, domains_of(MIXTURE)
    )
    for name, numbers in domains_of(MIXTURE).items():
        rows = [row for row in range(6) if int(corpora[row]) in numbers]
        loss = sum((losses[row] * mask[row]).sum().item() for row in rows)
        tokens = sum(mask[row].sum().item() for row in rows)
        torch.testing.assert_close(found[name], torch.tensor([loss, tokens], dtype=torch.float32))
    assert found["lm loss code"].tolist() == [0, 0]
