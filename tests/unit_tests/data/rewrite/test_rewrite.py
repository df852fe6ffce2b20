"""Rewriting documents: every one once, whatever fails on the way, against a server over HTTP."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit_tests.data.rewrite.chat_server import (
    MODEL,
    SERVED_MODEL,
    Failure,
    answer_to,
    completion,
    serve,
)
from trinity_megatron.cli.main import main
from trinity_megatron.data.rewrite import chat_client
from trinity_megatron.data.rewrite.prompts import draw

pytest.importorskip("httpx", reason="pip install 'trinity_megatron[rewrite]'")
ROOT = Path(__file__).resolve().parents[4]
PROMPTS = {"plain.txt": "Say it plainly: {text}", "qa.txt": "As {questions} in JSON:\n{text}\n"}
NUM_ROWS = 20


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Two shards of rows, one of them compressed, and a text file."""
    folder = tmp_path / "web"
    (folder / "part").mkdir(parents=True)
    rows = [json.dumps({"text": f"row {number} \u00e9\n"}) for number in range(NUM_ROWS)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    more = "\n".join(json.dumps({"text": t}) for t in ("first", "", "third"))
    (folder / "part" / "b.jsonl.gz").write_bytes(gzip.compress(more.encode()))
    (folder / "c.txt").write_text("the text of a file")
    return folder


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "_FIRST_WAIT_S", 0.001)


def command(url: str, inputs: Path, out: Path, *flags: str) -> list[str]:
    prompts = []
    for name, text in PROMPTS.items():
        (inputs.parent / name).write_text(text)
        prompts.append(str(inputs.parent / name))
    return [
        *("data", "rewrite", "--input", str(inputs), "--prompt-file", *prompts),
        *("--base-url", url, "--model", MODEL, "--out", str(out), *flags),
    ]


def read_out(out: Path) -> dict[str, list[dict[str, Any]]]:
    folder = out / "documents"
    return {
        path.relative_to(folder).as_posix(): [
            json.loads(line) for line in path.read_text().splitlines()
        ]
        for path in sorted(folder.rglob("*.jsonl"))
    }


def test_every_document_with_its_origin(inputs: Path, tmp_path: Path) -> None:
    with serve() as server:
        assert main(command(server.url, inputs, tmp_path / "out", "--temperature", "0.5")) == 0
    shards = read_out(tmp_path / "out")
    assert list(shards) == ["web/a.jsonl", "web/c.txt.jsonl", "web/part/b.jsonl.gz.jsonl"]
    sources = {
        "web/a.jsonl": [(f"web/a.jsonl:{n + 1}", f"row {n} \u00e9\n") for n in range(NUM_ROWS)],
        "web/c.txt.jsonl": [("web/c.txt", "the text of a file")],
        "web/part/b.jsonl.gz.jsonl": [
            ("web/part/b.jsonl.gz:1", "first"),
            ("web/part/b.jsonl.gz:3", "third"),
        ],
    }
    names = sorted(PROMPTS)
    drawn = set()
    for shard, documents in sources.items():
        assert len(shards[shard]) == len(documents)
        for record, (source, text) in zip(shards[shard], documents, strict=True):
            number, seed = draw(1234, source, len(names))
            name = names[number]
            drawn.add(name)
            sent = PROMPTS[name].replace("{text}", text)
            assert record == {
                "text": answer_to(sent, seed),
                "source": source,
                "source_sha256": hashlib.sha256(text.encode()).hexdigest(),
                "prompt": name,
                "prompt_sha256": hashlib.sha256(PROMPTS[name].encode()).hexdigest(),
                "model": MODEL,
                "served_model": SERVED_MODEL,
                "seed": seed,
                "prompt_tokens": 7,
                "completion_tokens": len(answer_to(sent, seed).split()),
            }
    assert drawn == set(names)
    assert {body["temperature"] for body in server.bodies} == {0.5}
    assert server.asked.total() == NUM_ROWS + 3


def test_the_documents_can_be_prepared(inputs: Path, tmp_path: Path) -> None:
    from trinity_megatron.data.corpus import Document, find_files, read_documents

    with serve() as server:
        assert main(command(server.url, inputs, tmp_path / "out")) == 0
    files, skipped = find_files([tmp_path / "out" / "documents"])
    assert not skipped
    texts = [entry.text for entry in read_documents(files) if isinstance(entry, Document)]
    assert sorted(texts) == sorted(
        record["text"] for records in read_out(tmp_path / "out").values() for record in records
    )


def fail_twice(prompt: str, attempt: int) -> Any:
    failures = [(503, "busy", {}), (429, {"error": "slow down"}, {"Retry-After": "0.01"})]
    return failures[attempt - 1] if attempt <= 2 else None


def test_passing_failures_are_asked_again(inputs: Path, tmp_path: Path) -> None:
    with serve() as server:
        assert main(command(server.url, inputs, tmp_path / "calm")) == 0
    with serve(fail_twice) as server:
        assert main(command(server.url, inputs, tmp_path / "out")) == 0
    assert set(server.asked.values()) == {3}
    assert read_out(tmp_path / "out") == read_out(tmp_path / "calm")


def test_requests_at_a_time_are_bounded(inputs: Path, tmp_path: Path) -> None:
    with serve(seconds=0.05) as server:
        assert main(command(server.url, inputs, tmp_path / "out", "--concurrency", "4")) == 0
    # Of one shard after another there would be one at a time in the last ones.
    assert server.most_at_a_time == 4


def count_journalled(out: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in out.rglob("*.journal"))


def test_goes_on_after_a_kill(inputs: Path, tmp_path: Path) -> None:
    with serve() as server:
        assert main(command(server.url, inputs, tmp_path / "whole")) == 0
    out, concurrency = tmp_path / "out", 3
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with serve(seconds=0.1) as server:
        flags = command(server.url, inputs, out, "--concurrency", str(concurrency))
        process = subprocess.Popen(
            [sys.executable, "-m", "trinity_megatron.cli", *flags], env=environment
        )
        deadline = time.monotonic() + 120
        while count_journalled(out) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.3)  # the server ends what was asked
        kept = count_journalled(out)
        assert 5 <= kept < NUM_ROWS
        [journal] = out.rglob("*.journal")
        with journal.open("ab") as file:  # as a write that was cut off leaves it
            file.write(b'[19, {"text": "half of')
        assert main(flags) == 0
    assert read_out(out) == read_out(tmp_path / "whole")
    assert not list(out.rglob("*.journal"))
    # What was kept is not asked again; what was under way at the kill may be.
    assert server.asked.total() <= NUM_ROWS + 3 + concurrency
    assert sum(count > 1 for count in server.asked.values()) <= concurrency
    with serve(lambda prompt, attempt: (500, "never", {})) as dead:
        assert main(command(dead.url, inputs, out)) == 0  # there is nothing left to ask
    assert not dead.asked


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        ((200, completion("half of it", end="length"), {}), "cut off after --max-tokens 2048"),
        ((200, completion(" \n"), {}), "empty"),
        ((200, completion(None, end="tool_calls"), {}), "empty (finish_reason 'tool_calls')"),
        ((200, completion("a", end="content_filter"), {}), "content filter"),
        ((200, completion("a \ud800"), {}), "no valid Unicode"),
        ((400, {"error": {"message": "maximum context length"}}, {}), "maximum context length"),
    ],
)
def test_a_document_without_an_answer(
    failure: Any, told: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(prompt: str, attempt: int) -> Any:
        return failure if "row 7 " in prompt else None

    out = tmp_path / "out"
    with serve(fail) as server:
        flags = command(server.url, inputs, out)
        assert main(flags) == 2
        error = capsys.readouterr().err
        assert "web/a.jsonl:8" in error and told in error and "--max-failed 1" in error
        assert not (out / "documents" / "web" / "a.jsonl").exists()
        assert main([*flags, "--max-failed", "1"]) == 0
    assert "1 failed" in capsys.readouterr().out
    shard = read_out(out)["web/a.jsonl"]
    assert [int(record["source"].split(":")[1]) for record in shard] == [
        number for number in range(1, NUM_ROWS + 1) if number != 8
    ]
    [failed] = [json.loads(line) for line in (out / "failed/web/a.jsonl").read_text().splitlines()]
    assert failed["source"] == "web/a.jsonl:8" and told in failed["problem"]
    assert failed["prompt"] in PROMPTS


def test_a_later_process_asks_again_for_what_failed(inputs: Path, tmp_path: Path) -> None:
    def fail(prompt: str, attempt: int) -> Any:
        return (400, "not now", {}) if attempt == 1 and "row 7 " in prompt else None

    with serve(fail) as server:
        flags = command(server.url, inputs, tmp_path / "out", "--concurrency", "1")
        assert main(flags) == 2
        assert main(flags) == 0
    assert len(read_out(tmp_path / "out")["web/a.jsonl"]) == NUM_ROWS
    assert not (tmp_path / "out" / "failed").exists()


KEY = "sk-a-key-that-nobody-should-see"


def test_the_key_is_sent_and_nowhere_else(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    out = tmp_path / "out"
    with serve(key="another") as server:
        assert main(command(server.url, inputs, out, "--api-key-variable", "SOME_KEY")) == 2
    error = capsys.readouterr().err  # the server repeats what it was sent
    assert "401" in error and "--api-key-variable" in error and "Bearer ***" in error
    with serve(key=KEY) as server:
        assert main(command(server.url, inputs, out, "--api-key-variable", "SOME_KEY")) == 0
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert KEY not in path.read_text()
    captured = capsys.readouterr()
    assert KEY not in captured.out + captured.err + error
    monkeypatch.delenv("SOME_KEY")
    assert (
        main(command("http://127.0.0.1:9/v1", inputs, out, "--api-key-variable", "SOME_KEY")) == 2
    )
    assert "export SOME_KEY" in capsys.readouterr().err


def never(status: int, body: Any) -> Failure:
    return lambda prompt, attempt: (status, body, {})


@pytest.mark.parametrize(
    ("fail", "told"),
    [
        (never(500, "out of memory"), "failed 8 times in a row: 500 out of memory"),
        (never(200, "<html>hello</html>"), "does not answer as /v1/chat/completions does: <html>"),
        (never(200, {"choices": []}), "does not answer as"),
        (never(307, ""), "answers 307"),
    ],
)
def test_a_server_that_is_none(
    fail: Failure,
    told: str,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serve(fail) as server:
        assert main(command(server.url, inputs, tmp_path / "out", "--concurrency", "1")) == 2
    assert told in capsys.readouterr().err


def test_wrong_addresses(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with serve() as server:
        closed = server.url
        assert main(command(server.url.removesuffix("/v1"), inputs, out)) == 2
        assert "404" in capsys.readouterr().err
        model = [MODEL, "other"]
        flags = command(server.url, inputs, tmp_path / "other")
        assert main([model[1] if flag == model[0] else flag for flag in flags]) == 2
        assert "no model other" in capsys.readouterr().err
    assert main(command(closed, inputs, out)) == 2
    assert "failed 8 times in a row: ConnectError" in capsys.readouterr().err
    for url, told in (
        ("localhost:8000", "is no address"),
        ("http://me:secret@host/v1", "password"),
        ("http://host/v1?key=secret", "password"),
    ):
        assert main(command(url, inputs, out)) == 2
        error = capsys.readouterr().err
        assert told in error and "secret" not in error


def test_other_settings_are_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with serve() as server:
        flags = command(server.url, inputs, out)
        assert main(flags) == 0
        assert main([*flags, "--seed", "5", "--temperature", "1"]) == 2
        assert "other seed, temperature" in capsys.readouterr().err
        (inputs / "c.txt").write_text("another text")
        assert main(flags) == 2
        assert "other sources" in capsys.readouterr().err
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        (foreign / "notes.txt").write_text("mine")
        assert main(command(server.url, inputs, foreign)) == 2
        assert "holds other files (notes.txt)" in capsys.readouterr().err


def test_prompts_are_checked(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = command("http://127.0.0.1:9/v1", inputs, tmp_path / "out")
    (tmp_path / "qa.txt").write_text("no place for the document")
    assert main(flags) == 2
    assert "put {text} there" in capsys.readouterr().err
    (tmp_path / "qa.txt").unlink()
    assert main(flags) == 2
    assert "qa.txt cannot be read" in capsys.readouterr().err
    flags[flags.index("--prompt-file") + 2] = flags[flags.index("--prompt-file") + 1]
    assert main(flags) == 2
    assert "another prompt is called plain.txt" in capsys.readouterr().err


def test_two_files_of_one_name_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a").write_text("text")
    (folder / "a.jsonl").write_text('{"text": "row"}\n')
    assert main(command("http://127.0.0.1:9/v1", folder, tmp_path / "out")) == 2
    assert "would both be in/a.jsonl" in capsys.readouterr().err
