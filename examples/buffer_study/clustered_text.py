"""Clustered text for the buffer study, from files that every installation has.

Five kinds of text that a small model finds unequally hard.  The documents of a kind lie sorted by
length and are cut into clusters; the clusters come in an order of the seed.
"""

from __future__ import annotations

import ast
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path

# Bytes of each kind; shorter and longer documents are left out.
KIND_BYTES, MIN_BYTES, MAX_BYTES = 260_000, 40, 1_000
# base64 has twice the tokens for its bytes.
_SHARES = {"certificates": 0.5}
# Pieces into which files are cut, in turn; a sequence of the study has about 1200 bytes.
_PIECES = (50, 100, 200, 400, 800)
_MAX_FILE_BYTES = 2**18


def write_clustered(path: Path, *, cluster_bytes: int, seed: int) -> None:
    """Write documents as JSON lines, ``text`` and ``kind``, cluster by cluster.

    Args:
        path: The file.
        cluster_bytes: A cluster ends with the document that reaches this.
        seed: Orders the clusters.
    """
    clusters = [
        (zlib.crc32(f"{seed} {kind} {number}".encode()), kind, cluster)
        for kind, documents in read_kinds().items()
        for number, cluster in enumerate(cut_clusters(documents, cluster_bytes))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for _, kind, cluster in sorted(clusters):
            file.writelines(json.dumps({"text": text, "kind": kind}) + "\n" for text in cluster)


def cut_clusters(documents: Iterable[str], cluster_bytes: int) -> list[list[str]]:
    """Documents of like length together: sorted, and cut where a cluster has its bytes."""
    by_length = sorted(documents, key=lambda text: (len(text), text))
    before = [0, *accumulate(len(text) for text in by_length)]
    clusters: dict[int, list[str]] = {}
    for text, start in zip(by_length, before, strict=False):
        clusters.setdefault(start // cluster_bytes, []).append(text)
    return list(clusters.values())


def read_kinds() -> dict[str, list[str]]:
    """Documents by kind: distinct, about as many tokens of each."""
    library = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    torch = packages / "torch"
    kinds = {
        "python": _cut(_read(library.glob("*.py"))),
        "cpp": _cut(_read((torch / "include" / "c10").rglob("*.h"))),
        "prose": _docstrings(torch.rglob("*.py")),
        "tables": _cut(_read((library / "encodings").glob("*.py"))),
        # base64, which no model of text can guess
        "certificates": _cut(_read((packages / "certifi").glob("*.pem"))),
    }
    return {
        kind: _some(documents, int(KIND_BYTES * _SHARES.get(kind, 1.0)))
        for kind, documents in kinds.items()
    }


def _some(documents: Iterable[str], num_bytes: int) -> list[str]:
    """The first distinct ones with so many bytes."""
    chosen: dict[str, None] = {}
    size = 0
    for text in documents:
        if size >= num_bytes:
            break
        if MIN_BYTES <= len(text) <= MAX_BYTES and text not in chosen:
            chosen[text] = None
            size += len(text)
    return list(chosen)


def _read(paths: Iterable[Path]) -> Iterator[str]:
    """Files in an order that has nothing to do with their content."""
    for path in sorted(paths, key=lambda path: (zlib.crc32(path.name.encode()), str(path))):
        if path.stat().st_size <= _MAX_FILE_BYTES:
            yield path.read_text(encoding="utf-8", errors="replace")


def _docstrings(paths: Iterable[Path]) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for source in _read(paths):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield text


def _cut(texts: Iterable[str]) -> Iterator[str]:
    """Lines together up to sizes that take turns."""
    number = 0
    for text in texts:
        piece, size = [], 0
        for line in text.splitlines(keepends=True):
            piece.append(line)
            size += len(line)
            if size >= _PIECES[number % len(_PIECES)]:
                yield "".join(piece)
                piece, size, number = [], 0, number + 1
