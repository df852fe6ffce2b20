"""What a run starts from: damaged checkpoints, lost names, another batch size."""

import contextlib
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from trinity_megatron.checkpoint.torch_dist.tracker import TRACKER_NAME
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import ARGUMENT_DEST, MODEL_FIELDS

enter_host()

from trinity_megatron.training.resume import (  # noqa: E402
    check_start,
    check_step,
    find_newest,
    mend_tracker,
    resumed_samples,
)


def save(folder: Path, step: int, **args: Any) -> Path:
    """A checkpoint of Megatron with one tensor, named as the latest."""
    from megatron.core import dist_checkpointing

    made = folder / f"iter_{step:07d}"
    made.mkdir(parents=True)
    x = dist_checkpointing.ShardedTensor.from_rank_offsets("x", torch.arange(4096.0))
    dist_checkpointing.save({"args": Namespace(**args), "x": x}, str(made))
    (folder / TRACKER_NAME).write_text(str(step))
    return made


@pytest.fixture
def checkpoints(one_rank: None, tmp_path: Path) -> Path:
    """Of steps 10 and 20."""
    folder = tmp_path / "checkpoints"
    for step in (10, 20):
        save(folder, step, global_batch_size=8, consumed_train_samples=8 * step, seq_length=64)
    return folder


def start(folder: Path | None, **given: Any) -> None:
    values: dict[str, Any] = {
        "rank": 0,
        "save": folder,
        "load": folder,
        "pretrained_checkpoint": None,
        "non_persistent_ckpt_type": None,
        "ckpt_format": "torch_dist",
        "auto_detect_ckpt_format": False,
        "ckpt_step": None,
        "transformer_impl": "local",
        "finetune": False,
        "global_batch_size": 8,
        "lineage": None,
        "step_batch_size_schedule": None,
        "train_iters": 40,
        "seq_length": 64,
        "optimizer": "muon",
        "use_distributed_optimizer": False,
        "use_megatron_fsdp": False,
        "no_load_optim": False,
        "skip_train": False,
        "decrease_batch_size_if_needed": False,
        "verify_checksums": True,
        "on_damage": "fail",
        **dict.fromkeys([ARGUMENT_DEST.get(name, name) for name in MODEL_FIELDS]),
    }
    values.update(given)
    named = {key: str(item) if isinstance(item, Path) else item for key, item in values.items()}
    check_start(Namespace(**named), None)


@pytest.mark.parametrize("step", [99, 15, 0, -10])
def test_a_step_that_was_not_saved(step: int, checkpoints: Path, tmp_path: Path) -> None:
    words = f"--ckpt-step {step} is not in .* the steps 10, 20. Remedy: "
    with pytest.raises(ValueError, match=words):
        start(checkpoints, ckpt_step=step)
    with pytest.raises(ValueError, match=words):
        start(tmp_path / "new", pretrained_checkpoint=checkpoints, ckpt_step=step)
    with pytest.raises(ValueError, match=words):
        resumed_samples(
            Namespace(
                step_batch_size_schedule="0:8",
                finetune=False,
                load=str(checkpoints),
                ckpt_format="torch_dist",
                auto_detect_ckpt_format=False,
                ckpt_step=step,
            )
        )


def test_a_step_of_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--ckpt-step 10: .* holds no step at all. Remedy: "):
        start(tmp_path, ckpt_step=10)


def test_of_many_steps_the_newest_are_listed(tmp_path: Path) -> None:
    for step in range(1, 21):
        (tmp_path / f"iter_{step:07d}").mkdir()
    with pytest.raises(ValueError, match=r"the steps \.\.\., 11, .* 20\. Remedy"):
        check_step(21, tmp_path)


def test_whole_checkpoints_pass(checkpoints: Path, tmp_path: Path) -> None:
    start(checkpoints)
    start(checkpoints, ckpt_step=10)
    start(tmp_path / "new")
    start(None)
    start(checkpoints, save=tmp_path / "new")
    start(tmp_path / "new", pretrained_checkpoint=checkpoints)


@pytest.mark.parametrize("flag", ["load", "pretrained_checkpoint"])
def test_nothing_where_a_checkpoint_was_named(flag: str, tmp_path: Path) -> None:
    given = {"load": tmp_path / "new", "save": tmp_path / "new", flag: tmp_path / "nowhere"}
    with pytest.raises(
        ValueError, match=f"--{flag.replace('_', '-')} .*nowhere holds no check.*Rem"
    ):
        start(None, **given)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda step: cut(next(step.glob("*.distcp"))), r"distcp is truncated: \d+ of \d+ bytes"),
        (lambda step: next(step.glob("*.distcp")).unlink(), "distcp is missing"),
        (lambda step: (step / ".metadata").unlink(), "it has no .metadata"),
        (lambda step: cut(step / ".metadata"), ".metadata is damaged"),
        (shutil.rmtree, "iter_0000020 is no complete"),
    ],
)
@pytest.mark.parametrize("flag", ["load", "pretrained_checkpoint"])
def test_a_damaged_checkpoint_is_named_and_an_older_one_offered(
    flag: str, damage: Any, message: str, checkpoints: Path, tmp_path: Path
) -> None:
    damage(checkpoints / "iter_0000020")
    new = tmp_path / "new"
    given = {} if flag == "load" else {"load": new, "save": new, flag: checkpoints}
    with pytest.raises(ValueError, match=f"^--{flag.replace('_', '-')}: .*{message}") as error:
        start(checkpoints, **given)
    if flag == "load":
        assert "Or go on from the complete checkpoint 10: --ckpt-step 10." in str(error.value)
        start(checkpoints, ckpt_step=10)


def test_no_older_one_is_made_up(checkpoints: Path) -> None:
    cut(checkpoints / "iter_0000010" / ".metadata")
    cut(checkpoints / "iter_0000020" / ".metadata")
    with pytest.raises(ValueError, match="damaged") as error:
        start(checkpoints)
    assert "Or go on" not in str(error.value)


@pytest.mark.parametrize("word", [None, "", "2O", "\0\0"])
def test_a_run_that_could_not_name_its_checkpoint_goes_on(
    word: str | None, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = checkpoints / TRACKER_NAME
    tracker.unlink() if word is None else tracker.write_text(word)
    cut(next((checkpoints / "iter_0000020").glob("*.distcp")))  # killed while it was written
    start(checkpoints)
    assert tracker.read_text() == "10"
    assert "newest complete checkpoint now: 10" in capsys.readouterr().out
    start(checkpoints)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("is_dry", [False, True])
def test_a_dry_run_changes_nothing(is_dry: bool, checkpoints: Path) -> None:
    cut(checkpoints / "iter_0000020" / "__0_0.distcp")
    with contextlib.suppress(UserError):  # a dry run says that the latest is damaged
        start(checkpoints, on_damage="previous", is_dry=is_dry)
    names = {path.name for path in checkpoints.glob("*iter_*")}
    assert names == {"iter_0000010", f"{'' if is_dry else 'damaged_'}iter_0000020"}
    assert (checkpoints / TRACKER_NAME).read_text() == ("20" if is_dry else "10")
    (checkpoints / TRACKER_NAME).unlink()
    start(checkpoints, is_dry=is_dry)
    assert (checkpoints / TRACKER_NAME).exists() is not is_dry


def test_a_name_that_stands_is_left_alone(checkpoints: Path) -> None:
    for word in ("10", "release"):
        (checkpoints / TRACKER_NAME).write_text(word)
        mend_tracker(checkpoints)
        assert (checkpoints / TRACKER_NAME).read_text() == word


def test_a_spoilt_name_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "iter_0000010").mkdir()
    mend_tracker(tmp_path)  # the first checkpoint was never finished: the run begins anew
    (tmp_path / TRACKER_NAME).write_text("")
    with pytest.raises(ValueError, match="says '', and no complete checkpoint .*Remedy: "):
        mend_tracker(tmp_path)
    assert find_newest(tmp_path) is None


def test_another_folder_is_never_mended(checkpoints: Path, tmp_path: Path) -> None:
    (checkpoints / TRACKER_NAME).unlink()
    with pytest.raises(ValueError, match="--load .* holds no checkpoint"):
        start(checkpoints, save=tmp_path / "new")
    assert not (checkpoints / TRACKER_NAME).exists()


def test_only_rank_0_looks(checkpoints: Path) -> None:
    (checkpoints / TRACKER_NAME).write_text("")
    start(checkpoints, rank=1)
    assert (checkpoints / TRACKER_NAME).read_text() == ""


def test_another_batch_size(checkpoints: Path, tmp_path: Path) -> None:
    # 20 steps of 8 samples of 64 tokens.
    remedy = "Remedy: --step-batch-size-schedule .*'0:8 10240:16'"
    with pytest.raises(ValueError, match=f"--global-batch-size 16: .*batches of 8.*{remedy}"):
        start(checkpoints, global_batch_size=16)
    for schedule in ("0:16", "0:4 5120:16"):
        with pytest.raises(ValueError, match=f"schedule '{schedule}': .*160 samples in 20 steps"):
            start(checkpoints, step_batch_size_schedule=schedule)
    for schedule in ("0:8 10240:16", "0:8 99999:16", "0:8 10240:4"):
        start(checkpoints, step_batch_size_schedule=schedule)
    new = tmp_path / "new"
    for flag in ("finetune", "skip_train", "decrease_batch_size_if_needed"):
        start(checkpoints, global_batch_size=16, **{flag: True})
    start(None, global_batch_size=16, load=new, save=new, pretrained_checkpoint=checkpoints)


def test_a_schedule_of_batches_is_given_again(one_rank: None, tmp_path: Path) -> None:
    schedule = "0:4 2560:8"  # 10 steps of 4, then 15 of 8
    save(tmp_path, 25, step_batch_size_schedule=schedule, consumed_train_samples=160)
    with pytest.raises(ValueError, match=f"schedule '{schedule}'.*Remedy: --step.*'{schedule}'"):
        start(tmp_path, global_batch_size=8)
    start(tmp_path, step_batch_size_schedule=schedule)


def test_samples_before_a_resume(checkpoints: Path, tmp_path: Path) -> None:
    def count(folder: Path, **given: Any) -> int:
        values = {"step_batch_size_schedule": "0:8", "finetune": False, "load": str(folder)}
        values |= {"ckpt_format": "torch_dist", "auto_detect_ckpt_format": False, "ckpt_step": None}
        values |= {"verify_checksums": True, "on_damage": "fail"}
        return resumed_samples(Namespace(**{**values, **given}))

    assert count(checkpoints) == 160
    shard = checkpoints / "iter_0000020" / "__0_0.distcp"
    shard.rename(tmp_path / "elsewhere")
    assert count(checkpoints, on_damage="previous") == 80  # rank 0 goes back
    (tmp_path / "elsewhere").rename(shard)
    assert count(checkpoints, ckpt_step=10) == 80
    assert count(checkpoints, step_batch_size_schedule=None) == 0
    assert count(checkpoints, finetune=True) == count(tmp_path / "new") == 0
    for word in ("", "2O"):  # which rank 0 mends
        (checkpoints / TRACKER_NAME).write_text(word)
        assert count(checkpoints) == 160
    (checkpoints / TRACKER_NAME).write_text("release")
    assert count(checkpoints) == 0


MODEL = {"num_layers": 4, "num_experts": 8, "moe_router_topk": 2, "window_size": [7, 0]}


def test_another_model(one_rank: None, tmp_path: Path) -> None:
    folder, new = tmp_path / "run", tmp_path / "new"
    save(folder, 5, **MODEL, optimizer="muon")
    start(folder, **{**MODEL, "window_size": (7, 0)})
    for name, value in (("num_layers", 6), ("moe_router_topk", 4), ("window_size", (15, 0))):
        before = re.escape(f"{name} {MODEL[name]!r}; this run has {value!r}")
        with pytest.raises(ValueError, match=f"--load .*another model: .*{before}.*Remedy: "):
            start(folder, **{**MODEL, name: value})
    # A new run may compute with the weights in another way, as a longer context does.
    anew = {"load": new, "save": new, "pretrained_checkpoint": folder}
    start(folder, **{**MODEL, "window_size": (15, 0), **anew})
    start(folder, **{**MODEL, "window_size": (15, 0), "finetune": True})
    with pytest.raises(ValueError, match="--pretrained-checkpoint .*num_experts 8; .*has 16"):
        start(folder, **{**MODEL, "num_experts": 16, **anew})


def test_another_optimizer(one_rank: None, tmp_path: Path) -> None:
    save(tmp_path, 5, optimizer="muon")
    with pytest.raises(ValueError, match="--optimizer adam: .*muon. Remedy: --optimizer muon"):
        start(tmp_path, optimizer="adam")
    start(tmp_path, optimizer="adam", no_load_optim=True)
    start(tmp_path, optimizer="adam", finetune=True)
    start(tmp_path, optimizer="adam", skip_train=True)


def test_state_in_shards_and_whole(one_rank: None, tmp_path: Path) -> None:
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    save(sharded, 5, optimizer="muon", use_distributed_optimizer=True)
    save(whole, 5, optimizer="muon", use_distributed_optimizer=False)
    given: dict[str, Any] = {"use_distributed_optimizer": True}
    start(sharded, **given)
    start(whole)
    with pytest.raises(UserError, match="--load .*sharded.* Remedy: --use-distributed-optimizer"):
        start(sharded)
    with pytest.raises(UserError, match="^--use-distributed-optimizer: --load .*Remedy: drop"):
        start(whole, **given)
    with pytest.raises(UserError, match="^--use-megatron-fsdp: --load .*Remedy: drop --use-meg"):
        start(whole, **given, use_megatron_fsdp=True)
    start(sharded, no_load_optim=True)
    start(whole, **given, finetune=True)
    # What Megatron makes of the flag for other optimizers.
    layer_wise = {"use_distributed_optimizer": False, "use_layer_wise_distributed_optimizer": True}
    save(tmp_path / "soap", 5, optimizer="soap", **layer_wise)
    start(tmp_path / "soap", **given, optimizer="soap")
