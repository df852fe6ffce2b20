"""What a user sees when the input is at fault: the field, the value and the remedy."""

import gzip
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.functional_tests.launch import environment, only_in_all
from trinity_megatron.launch.local import single_rank_environment

pytestmark = pytest.mark.slow  # imports megatron.training

Parse = Callable[..., None]


@pytest.fixture
def parse(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parse]:
    """Parse a command line of the training entry, up to Megatron's own checks."""
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

    enter_host()
    from megatron.training import global_vars

    from trinity_megatron.training.arguments.parser import parse_trinity_args

    def run(flags: str, *, world: int = 1) -> None:
        for name, value in (("WANDB_MODE", "disabled"), ("RANK", "0"), ("WORLD_SIZE", str(world))):
            monkeypatch.setenv(name, value)
        given = f"--data {data} --out {tmp_path / 'out'}".split() if "--data " not in flags else []
        monkeypatch.setattr(sys, "argv", ["pretrain", *given, *flags.split()])
        parse_trinity_args()

    yield run
    if handler := global_vars._GLOBAL_SIGNAL_HANDLER:
        handler.release()
    global_vars.unset_global_variables()


@pytest.mark.parametrize(
    ("flags", "world", "expected"),
    [
        ("--preset huge", 1, ("--preset", "'huge'", "large")),
        (
            "--num-experts 30 --expert-model-parallel-size 4",
            4,
            ("--num-experts 30", "--expert-model-parallel-size 4"),
        ),
        ("--moe-router-topk 64", 1, ("--moe-router-topk 64", "32")),
        (
            "--tensor-model-parallel-size 3 --sequence-parallel",
            3,
            ("--tensor-model-parallel-size 3", "--num-attention-heads 8"),
        ),
        ("--tensor-model-parallel-size 2", 2, ("--sequence-parallel",)),
        ("--pipeline-model-parallel-size 2", 1, ("--pipeline-model-parallel-size 2", "--nproc 2")),
        ("--num-dense-layers 9", 1, ("--num-dense-layers 9", "--num-layers 4")),
        ("--dataloader-type cyclic", 1, ("--dataloader-type cyclic", "length of the run")),
        ("--dataloader-type external", 1, ("--dataloader-type external", "drop the flag")),
        ("--full-validation", 1, ("--full-validation", "not supported", "--eval-iters")),
        ("--multiple-validation-sets", 1, ("--multiple-validation-sets", "--eval-iters")),
        ("--freeze-all-layers", 1, ("--freeze-all-layers", "would be trained", "--skip-train")),
        ("--create-all-gather-group", 1, ("--create-all-gather-group", "drop the flag")),
        ("--use-checkpoint-args", 1, ("--use-checkpoint-args", "--preset DIR")),
        ("--reset-attention-mask", 1, ("--dataloader-inter-document-masking",)),
        ("--train-itres 3", 1, ("--train-itres", "did you mean --train-iters")),
        ("--save-interval 0", 1, ("--save-interval 0", "at least 1")),
        ("--expert-model-parallel-size 2", 1, ("--expert-model-parallel-size 2", "1 ranks")),
        ("--bf16 --fp16", 1, ("--fp16", "--bf16")),
        ("--sft", 1, ("--sft", "pretrain_gpt.py")),
        ("--attention-backend flash", 1, ("--attention-backend flash", "transformer_engine")),
        ("--moe-layer-freq 2", 1, ("--moe-layer-freq 2", "--num-dense-layers")),
        ("--no-rope-freq 3", 1, ("--no-rope-freq", "--global-attn-every-n-layers")),
        ("--dump-param-to-param-group-map f", 1, ("--dump-param-to-param-group-map", "Muon")),
        ("--save-tokens-per-expert-interval 2", 1, ("--save-tokens-per-expert", "TensorBoard")),
        ("--use-nccl-ub", 1, ("--use-nccl-ub", "CUDA")),
        ("--async-save --async-strategy nvrx", 1, ("--async-strategy nvrx", "nvidia-resiliency")),
        ("--rampup-batch-size 4 4 64", 1, ("--rampup-batch-size", "--step-batch-size-schedule")),
        (
            "--step-batch-size-schedule 5K:8",
            1,
            ("--step-batch-size-schedule '5K:8'", "threshold 0", "'0:12288 4.9T:16384'"),
        ),
        (
            "--step-batch-size-schedule 0:8,4096:9",
            2,
            ("--step-batch-size-schedule '0:8,4096:9'", "2 data-parallel", "batch of 9"),
        ),
        ("--transformer-impl transformer_engine", 1, ("transformer_engine", "CUDA", "local")),
        ("--fp8-format hybrid", 1, ("--fp8-format hybrid", "CUDA")),
        ("--exit-signal 2", 1, ("--exit-signal", "SIGTERM")),
        ("--moe-layer-freq ([1]*", 1, ("--moe-layer-freq", "invalid value")),
        ("--min-lr 1", 1, ("--min-lr 1", "--lr 0.01")),
        ("--squared-relu", 1, ("--squared-relu", "architecture")),
        ("--padded-vocab-size 100", 1, ("--padded-vocab-size 100", "512")),
        ("--rotary-percent 0.5", 1, ("--rotary-percent 0.5", "AFMoE", "--rotary-base")),
        ("--position-embedding-type yarn", 1, ("--position-embedding-type yarn", "AFMoE")),
        ("--lr-wsd-decay-iters 500", 1, ("--lr-wsd-decay-iters 500", "--train-iters 400")),
        ("--train-iters 1000000000000", 1, ("--train-iters 1000000000000", "memory")),
        ("--yaml-cfg f", 1, ("--yaml-cfg f", "all arguments")),
        ("--optimizer lion", 1, ("--optimizer lion", "emerging-optimizers")),
        ("--distributed-backend nccl", 1, ("nccl", "CUDA", "gloo")),
        (
            "--dataloader-inter-document-masking --tensor-model-parallel-size 2 "
            "--sequence-parallel",
            2,
            ("--micro-batch-size", "--dataloader-inter-document-masking", "mix sequences"),
        ),
    ],
)
def test_refused(flags: str, world: int, expected: tuple[str, ...], parse: Parse) -> None:
    with pytest.raises(ValueError) as error:
        parse(flags, world=world)
    message = str(error.value)
    assert all(part in message for part in (*expected, "Remedy: ")), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("tokens", "loss_mask", "expected"),
    [
        ([5, 6, 7, 8], [1, 1, 1, 1], [0, 0, 0, 0]),
        ([5, 6, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]),  # 6 is the last word and has no label
        ([5, 9, 6, 7], [0, 1, 1, 1], [0, 0, 0, 0]),  # --eod-mask-loss inside a text
        ([5, 6, 7, 9], [1, 1, 0, 1], [0, 0, 0, 0]),  # ... and at its end
        ([5, 6, 9, 0], [1, 0, 0, 0], [0, 0, 0, 1]),  # masked end of document, then padding
        ([0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]),
        ([0, 5, 0, 6], [1, 1, 1, 1], [0, 0, 0, 0]),  # 0 is a token like others
    ],
)
def test_where_padding_is(tokens: list[int], loss_mask: list[int], expected: list[int]) -> None:
    import torch

    from trinity_megatron.training.forward_step import padding_positions

    found = padding_positions(torch.tensor([tokens]), torch.tensor([loss_mask]).float())
    assert found.long().tolist() == [expected]


def test_no_data(parse: Parse, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        parse(f"--data {tmp_path / 'nowhere'}")
    assert all(part in str(error.value) for part in (str(tmp_path / "nowhere"), "prepare-data"))


def test_other_vocabulary_than_the_checkpoint(parse: Parse, data: Path, tmp_path: Path) -> None:
    from trinity_megatron.checkpoint.hf_assets import keep_tokenizer
    from trinity_megatron.data.manifest import load_manifest
    from trinity_megatron.training.resume import check_checkpoint_vocabulary

    manifest, checkpoints = load_manifest(data), tmp_path / "out" / "checkpoints"
    keep_tokenizer(manifest.tokenizer_path, checkpoints)
    check_checkpoint_vocabulary(checkpoints, manifest)
    (checkpoints / "tokenizer.sha256").write_text("0123456789abcdef" * 4)
    with pytest.raises(ValueError, match="--load .*0123456789ab.*512 tokens.*Remedy: "):
        parse("--preset tiny")


MIXTURE = """
corpora: {{web: {{path: {0}}}, code: {{path: {0}/validation{1}}}}}
phases: [{{until: {2}, weights: {{web: 1, code: 1}}}}]
order: {3}
"""


@pytest.mark.parametrize(
    ("flags", "given", "expected"),
    [
        ("--valid-data-path x", ("", "1T", "shuffled"), ("--valid-data-path", "names all data")),
        ("--eval-iters 0", ("", "3K", "shuffled"), ("last phase ends at 3.00K", "later until")),
        ("--eval-iters 0", ("x", "1T", "shuffled"), ("corpora.code.path", "validationx.idx")),
        ("--eval-iters 0", ("", "1T", "random"), ("order is 'random'", "rsdb")),
        (
            "--eval-iters 0 --num-layers-per-virtual-pipeline-stage 1",
            ("", "1T", "rsdb"),
            ("--num-layers-per-virtual-pipeline-stage 1 with order: rsdb",),
        ),
    ],
)
def test_a_mixture_that_is_refused(
    flags: str,
    given: tuple[str, str, str],
    expected: tuple[str, ...],
    parse: Parse,
    data: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(MIXTURE.format(data, *given))
    with pytest.raises((ValueError, OSError)) as error:
        parse(f"--preset tiny --data {path} {flags}")
    for words in (str(path), *expected):
        assert words in str(error.value), str(error.value)
    assert "Remedy: " in str(error.value)


GOOD_ROW = b'{"text": "x"}\n'


@pytest.mark.parametrize(
    ("name", "content", "flags", "expected"),
    [
        ("a.jsonl", GOOD_ROW, "", ("is raw text, and --tokenizer-model is no folder",)),
        ("a.jsonl", GOOD_ROW, "--vocab-size 9", ("--vocab-size 9",)),
        ("a.jsonl", b'{"body": "x"}\n', "{}", ("a.jsonl, line 1", "'text'", "text_key: NAME")),
        (
            "a.jsonl.gz",
            gzip.compress(GOOD_ROW * 9, mtime=0)[:-9],
            "{}",
            ("a.jsonl.gz", "Truncated"),
        ),
        ("a.parquet", b"PAR1" + bytes(99), "{}", ("a.parquet", "not a parquet file")),
        ("a.jsonl", GOOD_ROW, "{} --data-path x", ("--data-path x",)),
    ],
)
def test_raw_text_that_is_refused(
    name: str,
    content: bytes,
    flags: str,
    expected: tuple[str, ...],
    parse: Parse,
    data: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "raw" / name
    path.parent.mkdir()
    path.write_bytes(content)
    tokenizer = f"--tokenizer-model {data / 'tokenizer'}"
    with pytest.raises(ValueError) as error:
        parse(f"--preset tiny --eval-iters 0 --data {path.parent} {flags.format(tokenizer)}")
    for words in expected:
        assert words in str(error.value), str(error.value)
    assert not (tmp_path / "out").exists() and "\n" not in str(error.value)


def test_wrong_megatron() -> None:
    from trinity_megatron.training.arguments.parser import check_megatron_version

    for version in ("0.19.2", "0.19.3+local"):
        check_megatron_version(version)
    for version in ("0.18.0", "0.19.1", "0.20.0rc1", "1.0.0"):
        with pytest.raises(ValueError, match=f"megatron-core {version} .*Remedy: pip install"):
            check_megatron_version(version)


@pytest.mark.parametrize("fault", ["experts", "data"])
def test_a_command_fails_with_one_paragraph(fault: str, data: Path, tmp_path: Path) -> None:
    flags, expected = ["--moe-router-topk", "64"], ("--moe-router-topk 64", "Remedy: ")
    if fault == "data":
        broken = tmp_path / "data"
        shutil.copytree(data, broken)
        (broken / "train.bin").unlink()
        data, flags, expected = broken, [], (str(broken), "train.bin is missing", "prepare-data")
    command = [sys.executable, "-m", "trinity_megatron.cli", "train", "--nproc", "1"]
    command += ["--data", str(data), "--out", str(tmp_path / "out"), *flags]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert all(part in result.stderr for part in expected), result.stderr
    assert "Traceback" not in result.stderr and "Traceback" not in result.stdout
    # torch says on stderr when it finds a CUDA toolkit but no device.
    lines = [line for line in result.stderr.strip().splitlines() if "cpp_extension" not in line]
    assert len(lines) == 1, result.stderr


def test_adam_takes_the_rate_of_adam(parse: Parse) -> None:
    from megatron.training import get_args

    parse("--preset tiny --optimizer adam")
    args = get_args()
    assert (args.lr, args.min_lr) == (3e-3, 3e-4)
    assert (args.decoupled_lr, args.decoupled_min_lr) == (None, None)


def test_a_length_in_samples(parse: Parse) -> None:
    from megatron.training import get_args

    parse("--preset tiny --train-samples 800 --step-batch-size-schedule 0:4,40K:8")
    args = get_args()
    assert (args.train_iters, args.train_samples, args.lr_warmup_samples) == (None, 800, 80)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--keep-last 0", "--keep-last 0"),
        ("--save-interval 10 --save-retain-interval 15", "save_retain_interval"),
        ("--padded-vocab-size 256", "--padded-vocab-size 256"),
        ("--moe-router-score-function softmax", "--moe-router-score-function softmax"),
    ],
)
@pytest.mark.parametrize("is_new", [True, pytest.param(False, marks=only_in_all)])
def test_a_refused_start_leaves_nothing(
    flags: str, words: str, is_new: bool, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "one"
    if not is_new:
        out.mkdir(parents=True)
        (out / "arguments.txt").write_text("of the run that is there")
    command = [sys.executable, "-m", "trinity_megatron.training", "--data", str(data)]
    result = subprocess.run(
        [*command, "--out", str(out), *flags.split()],
        env={**environment(), **single_rank_environment(), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and last.startswith("error: ") and words in last, result.stderr
    if is_new:
        assert not (tmp_path / "runs").exists()
    else:
        left = sorted(path.name for path in out.iterdir() if path.name != ".lock")
        assert left == ["arguments.txt"]
