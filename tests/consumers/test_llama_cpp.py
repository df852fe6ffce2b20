"""llama.cpp loads our GGUF files: the same log-probabilities, and the same tokens.

``make consumers`` makes an environment with llama.cpp in a wheel and names it in
``TRINITY_LLAMA_PYTHON``; everything else leaves these tests out.
"""

import json
import os
import random
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tests.unit_tests.export.export_cases import MODEL, random_run, tokens
from trinity_megatron.checkpoint.convert import open_run
from trinity_megatron.export.gguf_file import FILE_NAME, write_gguf
from trinity_megatron.export.read_back import read_back

PYTHON = os.environ.get("TRINITY_LLAMA_PYTHON")
WORKER = Path(__file__).with_name("llama_cpp_worker.py")
NUM_LINES = 1000
# llama.cpp splits text at digits only in its second pass, so white space in front of a digit still
# sees it: its last blank stays alone, where the patterns of the tokenizer take the run as a whole.
BLANKS_BEFORE_DIGIT = re.compile(r"\s\s\d")
TEXTS = (
    "Grüße aus München, naïve façade: Ünïcödé",
    "日本語のテキストと한국어 텍스트 그리고 中文字符123",
    "ภาษาไทยไม่มีช่องว่าง; ພາສາລາວ; မြန်မာဘာသာ",
    "Привет, мир! Γειά σου Κόσμε. नमस्ते दुनिया. שלום עולם. مرحبا",
    "1 12 123 1234 12345 123456 1234567 a1b22c333d4444e55555",
    "€5 £10 ±½ ²³ → ⇒ ∀x∈ℝ 🙂🙃 👩‍👩‍👧",
    "\t\tdef f(x):  return x[0]=='it''s' # don't, can't",
    "  leading and trailing   ",
)

pytestmark = [
    pytest.mark.consumers,
    pytest.mark.skipif(PYTHON is None, reason="a part of make consumers"),
]


def ask(gguf: Path, folder: Path, batch: torch.Tensor, lines: list[str]) -> dict[str, Any]:
    question = {"tokens": batch.tolist(), "lines": lines}
    (folder / "question.json").write_text(json.dumps(question), encoding="utf-8")
    files = (gguf, folder / "question.json", folder / "answer.npz")
    subprocess.run([str(PYTHON), str(WORKER), *map(str, files)], check=True, timeout=300)
    return dict(np.load(folder / "answer.npz"))


def stdlib_lines() -> list[str]:
    """Lines of Python, the same for the same Python."""
    draw, lines = random.Random(0), set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        lines.update(path.read_text(encoding="utf-8", errors="ignore").splitlines())
    return [*TEXTS, *draw.sample(sorted(lines), NUM_LINES - len(TEXTS))]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("llama")
    # Q8_0 needs rows of 32 numbers in every matrix.
    run = random_run(folder)
    return {"run": run, "folder": folder}


@pytest.mark.parametrize(("kind", "most"), [("F32", 1e-4), ("BF16", 0.05), ("Q8_0", 0.3)])
def test_log_probabilities(exports: dict[str, Any], tmp_path: Path, kind: Any, most: float) -> None:
    opened = open_run(exports["run"])
    write_gguf(opened, tmp_path / "out", kind=kind)
    batch = tokens(90)
    model = read_back(tmp_path / "out", opened.config)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = model(batch).logits.double().log_softmax(-1).numpy()
    found = ask(tmp_path / "out" / FILE_NAME, tmp_path, batch, [])["log_probabilities"]
    worst = np.abs(found - expected).max()
    print(f"\n{kind}: a log-probability differs by at most {worst:.2e}")
    assert expected.shape == found.shape and worst <= most
    assert expected.shape[1] > MODEL["sliding_window"]


def test_the_same_tokens(exports: dict[str, Any], tmp_path: Path) -> None:
    opened = open_run(exports["run"])
    write_gguf(opened, tmp_path / "out", kind="BF16")
    lines = stdlib_lines()
    answer = ask(tmp_path / "out" / FILE_NAME, tmp_path, tokens(2), lines)
    theirs = np.split(answer["ids"], np.cumsum(answer["lengths"])[:-1])
    tokenizer = Tokenizer.from_file(str(exports["folder"] / "hf" / "tokenizer.json"))
    different = [
        line
        for line, ids in zip(lines, theirs, strict=True)
        if tokenizer.encode(line, add_special_tokens=False).ids != ids.tolist()
    ]
    print(f"\n{NUM_LINES - len(different)} of {NUM_LINES} lines have the same tokens; {different}")
    assert all(BLANKS_BEFORE_DIGIT.search(line) for line in different), different
    assert len(different) <= NUM_LINES // 50
