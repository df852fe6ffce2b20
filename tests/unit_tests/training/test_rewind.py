"""Where a run goes back to after a series of spikes, and what it passes over."""

from argparse import Namespace
from pathlib import Path

import pytest

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.errors import UserError

enter_host()

from trinity_megatron.training import rewind as module  # noqa: E402
from trinity_megatron.training.rewind import FILE_NAME, check_rewind, read_rewinds, rewind  # noqa: E402

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """A run with checkpoints of every 100th step, all whole."""
    save = tmp_path / "checkpoints"
    for step in range(100, 1000, 100):
        (save / f"iter_{step:07d}").mkdir(parents=True)
    (save / TRACKER).write_text("900")

    def newest(folder: Path, step: int) -> int | None:
        assert folder == save
        return max((s for s in range(100, 1000, 100) if s < step), default=None)

    monkeypatch.setattr(module, "find_readable_before", newest)
    return Namespace(
        out=str(tmp_path), save=str(save), load=str(save), rewind_on_spike=True, skip_spikes=6.0,
        ckpt_step=None, ckpt_format="torch_dist", non_persistent_ckpt_type=None,
        iterations_to_skip=[3],
    )  # fmt: skip


def test_it_goes_back_before_the_series(
    args: Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    # Step 400 was saved within the series: its weights are those of before.
    decided = rewind(args, 395, 404)
    assert (
        decided == "the next start goes back to step 300 and passes over the batches up to step 404"
    )
    assert (Path(args.save) / TRACKER).read_text() == "300"
    check_rewind(args)
    assert args.iterations_to_skip == [3, *range(301, 405)]
    assert "steps 301 to 404 are passed over" in capsys.readouterr().out


def test_the_same_place_again_goes_back_further(args: Namespace) -> None:
    assert "step 300 " in (rewind(args, 395, 404) or "")
    assert "step 200 " in (rewind(args, 410, 419) or "")
    assert "step 100 " in (rewind(args, 425, 434) or "")
    assert rewind(args, 440, 449) is None  # a person has to look
    assert [(each.back_to, each.last) for each in read_rewinds(Path(args.out))] == [
        (300, 404),
        (200, 419),
        (100, 434),
    ]
    assert "step 800 " in (rewind(args, 850, 859) or "")  # another place


def test_nothing_to_go_back_to(args: Namespace) -> None:
    assert rewind(args, 60, 69) is None
    assert not (Path(args.out) / FILE_NAME).exists()
    assert (Path(args.save) / TRACKER).read_text() == "900"


@pytest.mark.parametrize("content", ["{", "{}", '[{"back_to": 3}]', "[3]"])
def test_a_damaged_file(content: str, args: Namespace) -> None:
    (Path(args.out) / FILE_NAME).write_text(content)
    with pytest.raises(UserError, match=r"rewinds.json is damaged .* Remedy: delete it"):
        check_rewind(args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip_spikes": None}, "needs --skip-spikes"),
        ({"out": None}, "needs --out"),
        ({"load": "elsewhere"}, "own folder"),
        ({"ckpt_step": 7}, "--ckpt-step 7"),
        ({"non_persistent_ckpt_type": "global"}, "lasting checkpoints"),
        ({"ckpt_format": "torch"}, "torch_dist only"),
    ],
)
def test_what_does_not_go_together(
    changes: dict[str, object], message: str, args: Namespace
) -> None:
    values = vars(args) | changes
    with pytest.raises(UserError, match=f"--rewind-on-spike .*{message}.* Remedy"):
        check_rewind(Namespace(**values))
    check_rewind(Namespace(**values | {"rewind_on_spike": False}))
