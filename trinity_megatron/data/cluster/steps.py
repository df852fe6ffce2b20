"""A file of datatrove's steps: what it names, in stages that an engine runs one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity_megatron.data.cluster.engines import datatrove_class
from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.yaml_file import read_yaml

_READERS = "datatrove.pipeline.readers"
# Where the name of a step is looked for.
_STEP_MODULES = (
    "datatrove.pipeline.filters",
    "datatrove.pipeline.formatters",
    "datatrove.pipeline.extractors",
)
MINHASH = "MinhashDedup"
# What steps fetch from the network when they run for the first time on a machine.
DOWNLOADS = {
    "LanguageFilter": "a fastText model of languages (lid.176.bin, 131 MB, or GlotLID)",
    "FastTextClassifierFilter": "the model of its model_url",
    "UnigramLogProbFilter": "a table of word frequencies",
    "C4BadWordsFilter": "a list of words",
    "URLFilter": "the list of public suffixes (tldextract)",
}


@dataclass(frozen=True)
class StepSpec:
    """A step by its name.

    Attributes:
        name: Of datatrove's class, or :data:`MINHASH`.
        arguments: Of its constructor.
        module: Where the class is; None for :data:`MINHASH`.
    """

    name: str
    arguments: dict[str, Any]
    module: str | None

    def make(self, **more: Any) -> Any:
        """The step.

        Raises:
            UserError: An argument is none of its own, or a package is missing.
        """
        assert self.module is not None
        return _make(datatrove_class(self.module, self.name), self.name, {**self.arguments, **more})


@dataclass(frozen=True)
class StepFile:
    """The content of a file of steps.

    Attributes:
        reader: Reads the documents.
        steps: What they go through.
    """

    reader: StepSpec
    steps: tuple[StepSpec, ...]

    def downloads(self) -> list[str]:
        """What steps will fetch, in words."""
        return [f"{s.name}: {DOWNLOADS[s.name]}" for s in self.steps if s.name in DOWNLOADS]

    def stages(self) -> list[tuple[StepSpec | None, list[StepSpec]]]:
        """The steps cut before each deduplication, which has to have seen all documents.

        Returns:
            For each stage its deduplication, None for the first, and the steps behind it.
        """
        stages: list[tuple[StepSpec | None, list[StepSpec]]] = [(None, [])]
        for step in self.steps:
            if step.name == MINHASH:
                stages.append((step, []))
            else:
                stages[-1][1].append(step)
        return stages

    def check(self) -> None:
        """Make each step once.

        Raises:
            UserError: One cannot be made.
        """
        self.reader.make()
        for step in self.steps:
            if step.name == MINHASH:
                make_minhash(step, Path("unused"))
            else:
                step.make()


def read_steps(path: Path) -> StepFile:
    """Read a file of steps.

    Raises:
        UserError: It cannot be read, or names what is not there.
    """
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Remedy: a YAML file of steps.") from error
    if not isinstance(content, Mapping) or not {"reader"} <= content.keys() <= {"reader", "steps"}:
        raise UserError(
            f"{path} has other keys than reader and steps. Remedy: see docs/data.md, Filtering."
        )
    steps = content.get("steps") or []
    if not isinstance(steps, list):
        raise UserError(f"{path}: steps is no list. Remedy: a line '- NAME: {{...}}' for each.")
    reader = _read_step(path, content["reader"], (_READERS,))
    return StepFile(reader, tuple(_read_step(path, step, _STEP_MODULES) for step in steps))


@dataclass(frozen=True)
class Minhash:
    """The four parts of a deduplication by MinHash.

    Attributes:
        signature: Of each task.
        buckets: Of ``num_buckets`` tasks.
        cluster: Of one task.
        keep: Drops all but one of each cluster; of as many tasks as ``signature``.
        num_buckets: Number of buckets.
    """

    signature: Any
    buckets: Any
    cluster: Any
    keep: Any
    num_buckets: int


def make_minhash(step: StepSpec, folder: Path) -> Minhash:
    """The parts of a deduplication.

    Args:
        step: With the fields of datatrove's ``MinhashConfig``, and ``language``.
        folder: For what they hand on.

    Raises:
        UserError: An argument is none of these, or a package is missing.
    """
    module = "datatrove.pipeline.dedup.minhash"
    arguments = dict(step.arguments)
    language = {"language": arguments.pop("language")} if "language" in arguments else {}

    def make(name: str, values: dict[str, Any]) -> Any:
        return _make(datatrove_class(module, name), step.name, values)

    config = make("MinhashConfig", arguments)
    signatures, buckets, removed = (str(folder / n) for n in ("signatures", "buckets", "removed"))
    return Minhash(
        make("MinhashDedupSignature", {"output_folder": signatures, "config": config, **language}),
        make(
            "MinhashDedupBuckets",
            {"input_folder": signatures, "output_folder": buckets, "config": config},
        ),
        make(
            "MinhashDedupCluster",
            {"input_folder": buckets, "output_folder": removed, "config": config},
        ),
        make("MinhashDedupFilter", {"input_folder": removed}),
        config.num_buckets,
    )


def _read_step(path: Path, value: Any, modules: tuple[str, ...]) -> StepSpec:
    """A step: its name, or a mapping of one name to its arguments."""
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise UserError(
            f"{path}: {value!r} is no step. Remedy: NAME, or NAME: {{argument: value}}."
        )
    [(name, arguments)] = value.items()
    if not isinstance(arguments, Mapping | None):
        raise UserError(f"{path}: {name} has {arguments!r} where arguments should be.")
    if name == MINHASH and _READERS not in modules:
        return StepSpec(name, dict(arguments or {}), None)
    for module in modules:
        if datatrove_class(module, name) is not None:
            return StepSpec(name, dict(arguments or {}), module)
    where = " and ".join(modules)
    raise UserError(f"{path}: {name!r} is no class of {where}. Remedy: correct the name.")


def _make(kind: Any, name: str, arguments: dict[str, Any]) -> Any:
    try:
        return kind(**arguments)
    except TypeError as error:
        raise UserError(f"step {name}: {error}. Remedy: correct its arguments.") from error
    except ImportError as error:
        raise UserError(f"step {name} needs another package. Remedy: {error}") from error
    except Exception as error:  # the steps check their arguments in many ways
        raise UserError(
            f"step {name} cannot be made ({type(error).__name__}: {error}). Remedy: correct its "
            "arguments."
        ) from error
