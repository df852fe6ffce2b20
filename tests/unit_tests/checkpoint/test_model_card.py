"""The model card of an export: a lineage of anybody is one line of text for each run."""

from pathlib import Path
from typing import Any

import pytest

from trinity_megatron.checkpoint.model_card import CARD_NAME, write_lineage
from trinity_megatron.errors import UserError

RUN: dict[str, Any] = {
    "parent": "/home/me/runs/first/checkpoints",
    "step": 10,
    "consumed_tokens": 4096,
    "seq_length": 32,
    "before": None,
}


def test_a_name_is_one_word(tmp_path: Path) -> None:
    name = "x`\n\n# Title\n<script>alert(1)</script>"
    write_lineage(tmp_path, {**RUN, "parent": f"/home/me/{name}/checkpoints"})
    card = (tmp_path / CARD_NAME).read_text()
    lines = card.partition("## Lineage\n\n")[2].splitlines()
    assert len(lines) == 1 and lines[0].count("`") == 2
    write_lineage(tmp_path, RUN)
    assert "the run `first`." in (tmp_path / CARD_NAME).read_text()


def test_a_lineage_without_end(tmp_path: Path) -> None:
    loop = dict(RUN)
    loop["before"] = loop
    write_lineage(tmp_path, loop)
    assert (tmp_path / CARD_NAME).read_text().count("the run `first`") == 100


@pytest.mark.parametrize("change", [{"parent": 3}, {"step": "x"}, {"before": [1]}, {"step": [1]}])
def test_a_damaged_lineage(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the lineage .* is damaged"):
        write_lineage(tmp_path, {**RUN, **change})
