"""A link in a downloaded folder cannot bring a file of the user into a copy."""

from pathlib import Path

import pytest

from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.links import copy_file


@pytest.mark.parametrize("link", ["../key", "/{root}/key", "inner/../../key", "again"])
def test_links_that_lead_out(tmp_path: Path, link: str) -> None:
    (tmp_path / "key").write_text("secret")
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "again").symlink_to("../key")
    (folder / "NOTES").symlink_to(link.format(root=tmp_path))
    with pytest.raises(UserError, match="NOTES is a symbolic link that leads out"):
        copy_file(folder / "NOTES", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_links_that_stay(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "1a2b"
    folder.mkdir(parents=True)
    (folder.parent.parent / "blobs").mkdir()
    (folder.parent.parent / "blobs" / "c3").write_text("text")
    (folder / "NOTES").symlink_to("../../blobs/c3")
    (folder / "LICENSE").symlink_to("NOTES")
    (tmp_path / "linked").symlink_to(folder)  # the user's own name of the folder
    for number, path in enumerate((folder / "NOTES", tmp_path / "linked" / "LICENSE")):
        copy_file(path, tmp_path / str(number))
        assert (tmp_path / str(number)).read_text() == "text"


def test_a_link_to_a_key_in_a_downloaded_model(tmp_path: Path) -> None:
    from trinity_megatron.checkpoint.hf_assets import keep_tokenizer, save_assets, write_tokenizer

    (tmp_path / "key").write_text("secret")
    folder, target = tmp_path / "model", tmp_path / "target"
    for made in (folder, target):
        made.mkdir()
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_text("{}")
    (folder / "special_tokens_map.json").symlink_to("../key")
    for copy in (
        lambda: save_assets(folder, target, {}),
        lambda: keep_tokenizer(folder, target),
        lambda: write_tokenizer(folder, target),
    ):
        with pytest.raises(UserError, match=r"special_tokens_map\.json is a symbolic link"):
            copy()
    assert "secret" not in {file.read_text() for file in target.rglob("*") if file.is_file()}
