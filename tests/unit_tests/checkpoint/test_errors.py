"""What goes wrong in a conversion is named, and leaves nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference.hf_random import random_config, random_model
from trinity_megatron.checkpoint import convert, staging
from trinity_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from trinity_megatron.checkpoint.hf_writer import HFWriter
from trinity_megatron.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
EXPERT = "model.layers.3.mlp.experts.1.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint on both sides; not to be touched."""
    folder = tmp_path_factory.mktemp("source")
    config = random_config(2)
    config.vocab_size = 300  # rows for a tokenizer of all bytes
    random_model(config, 2).save_pretrained(folder / "hf")
    hf_to_megatron(folder / "hf", folder / "megatron")
    return folder / "hf", folder / "megatron"


@pytest.fixture
def hf(source: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(source[0], tmp_path / "hf")


@pytest.fixture
def megatron(source: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(source[1], tmp_path / "megatron")


def change(hf: Path, what: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint in one file."""
    file = hf / "model.safetensors"
    tensors = load_file(file)
    what(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT][1:].clone()


def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def put(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT][-1, -1] = value

    return put


def assert_nothing_left(target: Path) -> None:
    assert not target.exists()
    assert not [path for path in target.parent.iterdir() if path.name.startswith(target.name)]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda t: t.pop(EXPERT), f"missing: {EXPERT}"),
        (
            lambda t: t.update({"model.layers.0.mlp.gate": torch.ones(2)}),
            "not of this model: model.layers.0.mlp.gate",
        ),
        (cut, f"{EXPERT} has shape"),
        (spoil(float("nan")), f"{EXPERT} holds NaN or infinite"),
        (spoil(float("-inf")), f"{EXPERT} holds NaN or infinite"),
    ],
    ids=["missing", "extra", "shape", "nan", "infinite"],
)
def test_wrong_tensors(
    what: Callable, words: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(hf, what)
    target = tmp_path / "target"
    code = main(["convert", "--from-hf", str(hf), "--to-megatron", str(target)])
    assert code == 2 and words in capsys.readouterr().err
    assert_nothing_left(target)


def test_every_problem_is_listed(hf: Path, tmp_path: Path) -> None:
    change(hf, lambda t: [t.pop(n) for n in list(t) if ".experts.0." in n])
    with pytest.raises(ValueError, match="missing") as error:
        hf_to_megatron(hf, tmp_path / "target")
    assert "model.layers.3.mlp.experts.0.gate_proj.weight" in str(error.value)


def test_truncated_file(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = hf / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    target = tmp_path / "target"
    code = main(["convert", "--from-hf", str(hf), "--to-megatron", str(target)])
    assert code == 2 and "model.safetensors is truncated" in capsys.readouterr().err
    assert_nothing_left(target)


def test_target_that_is_not_empty(hf: Path, megatron: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("precious")
    for function, source in ((hf_to_megatron, hf), (megatron_to_hf, megatron)):
        with pytest.raises(ValueError, match="not an empty folder"):
            function(source, target)
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_damaged_megatron_shard(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next((megatron / "release").glob("__0_*.distcp"))
    os.truncate(file, file.stat().st_size // 2)
    target = tmp_path / "target"
    code = main(["convert", "--from-megatron", str(megatron), "--to-hf", str(target)])
    assert code == 2 and f"{file} is truncated" in capsys.readouterr().err
    assert_nothing_left(target)


def test_nan_in_megatron(hf: Path, source: tuple[Path, Path], tmp_path: Path) -> None:
    # What a diverged run saves has its checksums; these are not written anew here.
    change(hf, lambda t: t["lm_head.weight"].fill_(1.0))
    hf_to_megatron(hf, tmp_path / "megatron")
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(tmp_path / "megatron" / "release").read_metadata()
    places = [i for k, i in metadata.storage_data.items() if k.fqn == "output_layer.weight"]
    file = tmp_path / "megatron" / "release" / places[0].relative_path
    content = bytearray(file.read_bytes())
    begin, end = places[0].offset, places[0].offset + places[0].length
    # 1.0 in fp32 -> NaN, once.
    at = content.index(b"\x00\x00\x80\x3f" * 8, begin, end)
    content[at : at + 4] = b"\x00\x00\xc0\x7f"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"output_layer.weight, to be lm_head.weight holds NaN"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "target", verify_checksums=False)
    assert_nothing_left(tmp_path / "target")


def test_another_model_than_its_assets(megatron: Path, tmp_path: Path) -> None:
    path = megatron / "hf" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "route_scale": 9.0}))
    with pytest.raises(ValueError, match="moe_router_topk_scaling_factor"):
        megatron_to_hf(megatron, tmp_path / "target")
    assert_nothing_left(tmp_path / "target")


def run_on_small_disk(size: int, arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """Run the command with a full file system of its own at ``folder``."""
    script = (
        f"mount -t tmpfs -o size={size} tmpfs {folder} && cd {folder} && "
        f"{{ {sys.executable} -W ignore -m trinity_megatron.cli {arguments}; "
        'code=$?; echo "left: $(ls -A)"; exit $code; }'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def can_mount() -> bool:
    """Whether this user may mount in a name space of its own."""
    command = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs unshare and the right to mount a tmpfs")
@pytest.mark.parametrize("room", [-100_000, 20_000], ids=["seen before", "runs full"])
def test_full_disk(room: int, source: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    weights = (source[0] / "model.safetensors").stat().st_size
    for flags in (
        f"--from-hf {source[0]} --to-megatron {folder}/target",
        f"--from-megatron {source[1]} --to-hf {folder}/target",
    ):
        result = run_on_small_disk(weights + room, f"convert {flags}", folder)
        assert result.returncode == 2, result.stderr
        assert ("needs" if room < 0 else "No space left on device") in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout.splitlines()[-1] == "left: "


def test_killed_conversion_goes_on(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the middle: nothing at the target; the next one finishes the work."""
    monkeypatch.setattr(staging, "_JOB_BYTES", 50_000)
    target = tmp_path / "target"
    code = (
        "import os, sys; from pathlib import Path\n"
        "from trinity_megatron.checkpoint import convert, megatron_export, staging\n"
        "staging._JOB_BYTES = 50_000; staging._NUM_THREADS = 1\n"
        "real = megatron_export.TorchDistWriter.write\n"
        "def write(self, index, read):\n"
        "    if index == 3: os.kill(os.getpid(), 9)\n"
        "    return real(self, index, read)\n"
        "megatron_export.TorchDistWriter.write = write\n"
        "convert.hf_to_megatron(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(hf), str(target)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert killed.returncode == -9
    journal = target.with_name("target.incomplete") / "journal"
    assert not target.exists() and len(list(journal.glob("*.done"))) == 3
    finished = target.with_name("target.incomplete") / "content" / "release" / "__0_0.distcp"
    before = finished.stat().st_mtime_ns
    hf_to_megatron(hf, target)
    assert (target / "release" / "__0_0.distcp").stat().st_mtime_ns == before  # not written again
    assert not journal.exists()
    megatron_to_hf(target, tmp_path / "back")
    for file in hf.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_the_target_appears_whole(hf: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    seen: list[set[str]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if target.exists():
                seen.append({path.name for path in target.iterdir()})
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    hf_to_megatron(hf, target)
    end = time.monotonic() + 30  # on a busy machine the watcher may not have had its turn
    while not seen and time.monotonic() < end:
        time.sleep(0.01)
    done.set()
    watcher.join()
    assert seen and all(
        names == {"release", "hf", "latest_checkpointed_iteration.txt"} for names in seen
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--from-hf", "a"],
        ["--from-hf", "a", "--to-hf", "b"],
        ["--from-hf", "a", "--to-megatron", "b", "--from-megatron", "c", "--to-hf", "d"],
        [],
    ],
)
def test_flags_of_both_directions(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", *flags]) == 2
    assert "either --from-hf DIR --to-megatron DIR or" in capsys.readouterr().err


def test_nothing_is_read_ahead_on_a_gpu_host(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the writer of torch would read the next shard before it has written this one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    hf_to_megatron(hf, tmp_path / "megatron")
    monkeypatch.undo()
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()


def test_a_model_folder_gives_its_tokenizer_only(megatron: Path, hf: Path, tmp_path: Path) -> None:
    from trinity_megatron.data.tokenizer import save_tokenizer, train_tokenizer

    other = shutil.copytree(hf, tmp_path / "other")
    change(other, lambda t: t["lm_head.weight"].zero_())
    save_tokenizer(train_tokenizer(["one two three " * 9], vocab_size=262), other)
    megatron_to_hf(megatron, tmp_path / "back", tokenizer=other)
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()


@pytest.mark.usefixtures("one_rank")
def test_a_model_that_has_changed_is_saved_anew(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trinity_megatron.checkpoint import load_hf_model, save_hf_model

    model, target = load_hf_model(hf), tmp_path / "target"
    monkeypatch.setattr(staging, "_JOB_BYTES", 50_000)
    real = HFWriter.sync

    def stop(self: HFWriter, names: set[str]) -> None:
        real(self, names)
        if "lm_head.weight" in names:
            raise KeyboardInterrupt

    monkeypatch.setattr(HFWriter, "sync", stop)
    with pytest.raises(KeyboardInterrupt):
        save_hf_model(model, target)
    assert not target.exists()
    monkeypatch.setattr(HFWriter, "sync", real)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    save_hf_model(model, target)
    tensors = load_file(target / "model.safetensors")
    assert all((tensor == 2.0).all() for tensor in tensors.values())


def test_another_kind_of_checkpoint_is_refused() -> None:
    from argparse import Namespace

    args = Namespace(num_layers=4, num_experts=None, moe_layer_freq=1)
    with pytest.raises(ValueError, match="no Trinity model"):
        convert.config_from_args(args)


def test_nan_is_a_difference() -> None:
    from trinity_megatron.evaluation.hf_parity import Trace, compare

    logits = torch.ones(1, 2, 3)
    theirs = Trace(logits, {}, {})
    ours = Trace(logits.where(torch.arange(3) > 0, torch.nan), {}, {})
    assert not compare(ours, theirs).relative_difference <= 1.0
    assert compare(theirs, theirs).relative_difference == 0.0


def test_another_tokenizer_than_that_of_the_run(megatron: Path, tmp_path: Path) -> None:
    from trinity_megatron.data.corpus import hash_file
    from trinity_megatron.data.tokenizer import save_tokenizer, train_tokenizer
    from trinity_megatron.evaluation.generate import generate

    for name in ("its", "other"):
        save_tokenizer(train_tokenizer([f"{name} words " * 9], vocab_size=262), tmp_path / name)
    stamp = hash_file(tmp_path / "its" / "tokenizer.json")
    (megatron / "tokenizer.sha256").write_text(f"{stamp}\n")
    message = f"trained with the tokenizer {stamp[:12]}, but .*other is .*Remedy: --tokenizer"
    for load in (megatron, next(megatron.glob("release"))):
        with pytest.raises(ValueError, match=message):
            megatron_to_hf(load, tmp_path / "back", tokenizer=tmp_path / "other")
        with pytest.raises(ValueError, match=message):
            generate(load, "words", tokenizer=tmp_path / "other")
    megatron_to_hf(megatron, tmp_path / "back", tokenizer=tmp_path / "its")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"tokenizer": Path("/nowhere")}, "--tokenizer /nowhere holds no"),
    ],
)
def test_wrong_flags_of_generate(given: dict, message: str, megatron: Path) -> None:
    from trinity_megatron.evaluation.generate import generate

    with pytest.raises(ValueError, match=f"{message}.*Remedy: "):
        generate(megatron, "words", **given)


def test_wrong_size_of_files() -> None:
    from trinity_megatron.checkpoint.hf_writer import split_into_files

    with pytest.raises(ValueError, match="--max-shard-size 'five'.*Remedy: .*5GB"):
        split_into_files({"x": (torch.float32, (2, 3))}, max_shard_size="five")


@pytest.mark.parametrize("name", ["../../out.safetensors", "/tmp/out.safetensors", "config.json"])
def test_headers_that_lead_out_of_the_export(megatron: Path, tmp_path: Path, name: str) -> None:
    path = megatron / "hf" / "safetensors_headers.json"
    (header,) = json.loads(path.read_text()).values()
    path.write_text(json.dumps({name: header}))
    with pytest.raises(ValueError, match="not the plain name of a .safetensors file"):
        megatron_to_hf(megatron, tmp_path / "new" / "hf")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"model.safetensors": "{}x"}', '{"a.safetensors": 3}']
)
def test_damaged_headers(megatron: Path, tmp_path: Path, text: str) -> None:
    (megatron / "hf" / "safetensors_headers.json").write_text(text)
    with pytest.raises(ValueError, match=r"safetensors_headers\.json is damaged|is another model"):
        megatron_to_hf(megatron, tmp_path / "new")


def test_a_link_that_would_copy_a_foreign_file(megatron: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    (megatron / "hf" / "LICENSE").symlink_to(tmp_path / "key")
    with pytest.raises(ValueError, match="LICENSE is a symbolic link that leads out"):
        megatron_to_hf(megatron, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_damaged_numbers_are_not_converted(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = max((megatron / "release").glob("*.distcp"), key=lambda each: each.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    command = ["convert", "--from-megatron", str(megatron), "--to-hf", str(tmp_path / "new")]
    assert main(command) == 2
    assert f"{path} is damaged" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main([*command, "--no-verify-checksums"]) == 0
