"""Reads and checks the file of a mixture; what is wrong is named with file, key and remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from trinity_megatron.data.address import StoredAt, is_address
from trinity_megatron.data.formats import ReadOptions
from trinity_megatron.data.mixture.definition import (
    ORDERS,
    BufferSettings,
    Corpus,
    Mixture,
    Phase,
)
from trinity_megatron.data.mixture.quantities import format_tokens, parse_tokens
from trinity_megatron.data.rsdb.length_bias import LengthBias
from trinity_megatron.errors import MissingInputError, UserError
from trinity_megatron.untrusted.yaml_file import read_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_MAX_CORPORA = 4096
_MAX_LETTERS = 300  # of a value in a message
# Of a corpus of raw text.
_TEXT_KEYS = ("text_key", "split_on", "skip_bad_rows")


def load_mixture(path: str | Path) -> Mixture:
    """Read and check the file of a mixture; its corpora are not opened.

    Paths in it are relative to its folder.

    Args:
        path: The file.

    Raises:
        UserError: Names the file, the key, its value and the remedy.
    """
    path = Path(path)
    try:
        content = read_yaml(path)
    except FileNotFoundError as error:
        raise MissingInputError(f"--data {path}: there is no such file") from error
    except (ValueError, OSError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"--data {path} is no YAML file: {words}. Remedy: mend it.") from error
    return _Reader(path).read(content)


@dataclass(frozen=True)
class _Reader:
    file: Path

    def refuse(self, key: str, what: str, remedy: str) -> UserError:
        # A value may be a list of a million entries.
        return UserError(
            f"--data {self.file}: {key} {what:.{_MAX_LETTERS}}. Remedy: {remedy:.{_MAX_LETTERS}}."
        )

    def read(self, content: Any) -> Mixture:
        values = self.mapping(
            "the file", content, ("corpora", "phases", "order", "tokenizer", "rsdb"), ("corpora",)
        )
        corpora = self.corpora(values["corpora"])
        order = values.get("order", ORDERS[0])
        if order not in ORDERS:
            raise self.refuse("order", f"is {order!r}", f"one of {', '.join(ORDERS)}")
        if "rsdb" in values and order != "rsdb":
            raise self.refuse("rsdb", f"is given with order: {order}", "order: rsdb, or drop it")
        for corpus in corpora.values():
            if corpus.length_bias is not None and order != "rsdb":
                raise self.refuse(
                    f"corpora.{corpus.name}.length_bias",
                    f"is given with order: {order}, which knows no documents",
                    "order: rsdb, or drop it",
                )
        tokenizer = values.get("tokenizer")
        return Mixture(
            file=self.file,
            corpora=corpora,
            phases=self.phases(values.get("phases"), corpora),
            order=order,
            tokenizer=None if tokenizer is None else self.path("tokenizer", tokenizer),
            buffer=self.buffer(values.get("rsdb", {})),
        )

    def mapping(
        self, key: str, value: Any, known: tuple[str, ...], needed: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.refuse(
                key, f"is {_kind(value)}, not keys and values", "see docs/mixtures.md"
            )
        for name in value:
            if name not in known:
                raise self.refuse(
                    key, f"has the unknown key {name!r}", f"one of {', '.join(known)}"
                )
        for name in needed:
            if name not in value:
                raise self.refuse(key, f"has no {name}", f"add {name}: ...")
        return value

    def path(self, key: str, value: Any) -> Path:
        path = self.place(key, value)
        if isinstance(path, StoredAt):
            raise self.refuse(key, f"is the address {value}", "a copy on a file system")
        return path

    def place(self, key: str, value: Any) -> Path | StoredAt:
        if not isinstance(value, str) or not value or "\0" in value:
            raise self.refuse(key, f"is {value!r}, no path", "a path, in quotes")
        if is_address(value):
            return StoredAt(value.rstrip("/"))
        return self.file.parent / Path(value).expanduser()

    def corpora(self, value: Any) -> dict[str, Corpus]:
        if not isinstance(value, dict) or not value:
            raise self.refuse("corpora", f"is {_kind(value)}", "web: {path: data/web}")
        if len(value) > _MAX_CORPORA:
            raise self.refuse("corpora", f"has {len(value)} entries", f"at most {_MAX_CORPORA}")
        found: dict[str, Corpus] = {}
        for name, entry in value.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise self.refuse("corpora", f"has the name {name!r}", "letters, digits, - _ . +")
            found[name] = self.corpus(name, entry)
        return found

    def corpus(self, name: str, value: Any) -> Corpus:
        key = f"corpora.{name}"
        known = ("path", "validation", "language", "max_epochs", "length_bias", *_TEXT_KEYS)
        values = self.mapping(key, value, known, ("path",))
        language, epochs = values.get("language"), values.get("max_epochs")
        if language is not None and (
            not isinstance(language, str) or not _NAME.fullmatch(language)
        ):
            # YAML 1.1 reads `no`, Norwegian, as false.
            raise self.refuse(f"{key}.language", f"is {language!r}", "a name; in quotes: 'no'")
        if epochs is not None and (_is_no_number(epochs) or epochs <= 0):
            raise self.refuse(f"{key}.max_epochs", f"is {epochs!r}", "a number above 0")
        given = values.get("validation")
        return Corpus(
            name=name,
            path=self.place(f"{key}.path", values["path"]),
            validation=None if given is None else self.place(f"{key}.validation", given),
            language=language,
            max_epochs=epochs,
            length_bias=self.length_bias(f"{key}.length_bias", values.get("length_bias")),
            options=self.options(key, values),
            skips_bad_rows=self.skips_bad_rows(key, values),
        )

    def length_bias(self, key: str, value: Any) -> LengthBias | None:
        if value is None:
            return None
        values = self.mapping(key, value, ("floor", "ceiling", "tokens"))
        for name in ("floor", "ceiling"):
            share = values.get(name, 1.0)
            if _is_no_number(share) or not 0 < share <= 1:
                raise self.refuse(f"{key}.{name}", f"is {share!r}", "a share above 0, at most 1")
        try:
            if "tokens" in values:
                values = {**values, "tokens": parse_tokens(values["tokens"])}
        except ValueError as error:
            raise self.refuse(f"{key}.tokens", str(error), "tokens: 131072") from error
        return LengthBias(**values)

    def options(self, key: str, values: Mapping[str, Any]) -> ReadOptions:
        given = {name: values[name] for name in ("text_key", "split_on") if name in values}
        for name, value in given.items():
            if not isinstance(value, str) or not value:
                raise self.refuse(f"{key}.{name}", f"is {value!r}", "a text, in quotes")
        return ReadOptions(**given)

    def skips_bad_rows(self, key: str, values: Mapping[str, Any]) -> bool:
        value = values.get("skip_bad_rows", False)
        if not isinstance(value, bool):
            raise self.refuse(f"{key}.skip_bad_rows", f"is {value!r}", "true or false")
        return value

    def phases(self, value: Any, corpora: Mapping[str, Corpus]) -> tuple[Phase, ...]:
        if value is None and len(corpora) == 1:
            return (Phase(None, {name: Fraction(1) for name in corpora}),)
        if not isinstance(value, list) or not value:
            raise self.refuse(
                "phases", f"is {_kind(value)}", "- {until: 10T, weights: {web: 0.7, code: 0.3}}"
            )
        found: list[Phase] = []
        for index, entry in enumerate(value):
            key = f"phases[{index}]"
            values = self.mapping(key, entry, ("until", "weights"), ("weights",))
            is_last = index == len(value) - 1
            before = found[-1].until or 0 if found else 0
            until = self.until(key, values.get("until"), before, is_last=is_last)
            found.append(Phase(until, self.weights(f"{key}.weights", values["weights"], corpora)))
        for name in corpora:
            if not any(name in phase.weights for phase in found):
                raise self.refuse(
                    f"corpora.{name}", "has no weight in any phase", "a weight, or drop the corpus"
                )
        return tuple(found)

    def until(self, key: str, value: Any, before: int, *, is_last: bool) -> int | None:
        if value is None:
            if is_last:
                return None
            raise self.refuse(key, "has no until, and is not the last", "until: 10T")
        try:
            until = parse_tokens(value)
        except ValueError as error:
            raise self.refuse(f"{key}.until", str(error), "until: 10T") from error
        if until <= before:
            raise self.refuse(
                f"{key}.until",
                f"is {value}: the phase before it ends at {format_tokens(before)}, so this one is "
                "empty or out of order",
                "consumed tokens of the run, which grow from phase to phase",
            )
        return until

    def weights(self, key: str, value: Any, corpora: Mapping[str, Corpus]) -> dict[str, Fraction]:
        if not isinstance(value, dict) or not value:
            raise self.refuse(key, f"is {_kind(value)}", "{web: 0.7, code: 0.3}")
        for name, weight in value.items():
            if name not in corpora:
                known = ", ".join(list(corpora)[:10])
                raise self.refuse(f"{key}.{name}", "is no corpus", f"one of {known}")
            if _is_no_number(weight) or weight <= 0:
                raise self.refuse(
                    f"{key}.{name}",
                    f"is {weight!r}",
                    "a number above 0, or drop the corpus from this phase",
                )
        exact = {name: Fraction(str(value[name])) for name in sorted(value)}
        total = sum(exact.values())
        return {name: weight / total for name, weight in exact.items()}

    def buffer(self, value: Any) -> BufferSettings:
        values = self.mapping("rsdb", value, ("documents", "streams"))
        for name, number in values.items():
            if type(number) is not int or not 1 <= number <= 2**20:
                raise self.refuse(f"rsdb.{name}", f"is {number!r}", "1 to 1048576")
        return BufferSettings(**values)


def _is_no_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return not is_number or not math.isfinite(value)


def _kind(value: Any) -> str:
    if value is None:
        return "missing or empty"
    names = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false"}
    is_empty = isinstance(value, (dict, list, str)) and not value
    return "empty" if is_empty else names.get(type(value), f"the number {value!r}")
