"""The tracker file and the folder of the latest checkpoint."""

from pathlib import Path

import pytest

from trinity_megatron.checkpoint.torch_dist.tracker import find_checkpoint


@pytest.mark.parametrize(("word", "name"), [("12", "iter_0000012"), ("release\n", "release")])
def test_the_latest_is_found(checkpoint: Path, word: str, name: str) -> None:
    root = checkpoint.parent
    (root / "latest_checkpointed_iteration.txt").write_text(word)
    checkpoint.rename(root / name)
    assert find_checkpoint(root) == find_checkpoint(root / name) == root / name


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Megatron checkpoint: it has no latest_checkpointed"):
        find_checkpoint(tmp_path)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("yesterday")
    with pytest.raises(ValueError, match="says 'yesterday', which is neither an iteration nor"):
        find_checkpoint(tmp_path)
    tracker.write_text("34")
    (tmp_path / "iter_0000034").mkdir()  # of another format, or cut off
    with pytest.raises(ValueError, match="iter_0000034 is no complete torch_dist checkpoint"):
        find_checkpoint(tmp_path)
