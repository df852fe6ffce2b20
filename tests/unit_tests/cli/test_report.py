"""``trinity-megatron report``: where it writes and what it refuses."""

from pathlib import Path

import pytest

from trinity_megatron.cli.main import main


def test_report_without_event_files_is_the_users_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "no")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("trinity-megatron: error: ") and err.count("\n") == 1
    assert str(tmp_path / "no") in err and "Remedy" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["tensorboard", "."])
def test_report_says_where_the_page_is(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "run" / folder) as writer:
        for step in range(3):
            writer.add_scalar("lm loss", 2.0, step)
    assert main(["report", str(tmp_path / "run")]) == 0
    page = tmp_path / "run" / "report" / "report.html"
    assert capsys.readouterr().out == f"{page} and 1 picture\n"
    assert "<title>run</title>" in page.read_text(encoding="utf-8")
    out = tmp_path / "elsewhere"
    assert main(["report", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["loss.png", "report.html"]
