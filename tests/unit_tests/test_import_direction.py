"""The direction of imports: a module knows only what lies below it."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = "trinity_megatron"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE

# From below upwards: a folder or top-level module imports lower floors, and itself.
FLOORS = (
    ("errors", "untrusted", "upstream", "process", "cpu_host", "telemetry", "data"),
    ("model", "optimizer", "report"),
    ("checkpoint", "planner", "launch"),
    ("training", "evaluation", "export", "doctor"),
    ("cli",),
    # Names of before, which scripts hold; nothing of ours imports them.
    ("layer_specs", "presets", "moe"),
)
# Arrows inside a floor, none of which has a way back.
SIDEWAYS = {
    ("process", "errors"),
    ("upstream", "errors"),
    ("cpu_host", "upstream"),
    ("untrusted", "errors"),
    ("data", "errors"),
    ("data", "untrusted"),
    ("telemetry", "errors"),
    ("telemetry", "process"),
    ("optimizer", "model"),
    ("training", "evaluation"),
}
OPTIONAL = (
    "transformer_engine",
    "apex",
    "wandb",
    "emerging_optimizers",
    "gguf",
    "httpx",
    "lm_eval",
    "ray",
    "datatrove",
)
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix()
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py"
)


def get_room(module: str) -> str:
    """Top-level folder or module."""
    return module.split("/")[0]


def get_floor(module: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if get_room(module) in rooms:
            return number
    raise AssertionError(
        f"{PACKAGE}/{module}.py is on no floor. Add {get_room(module)} to FLOORS in "
        f"{Path(__file__).name}, as low as its imports allow."
    )


def get_folder(module: str) -> str:
    return module.rpartition("/")[0]


def is_allowed(importer: str, imported: str) -> bool:
    rooms = get_room(importer), get_room(imported)
    return get_floor(imported) < get_floor(importer) or rooms[0] == rooms[1] or rooms in SIDEWAYS


@cache
def parse(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))


def imported_names(module: str) -> Iterator[str]:
    """Absolute dotted names that a module imports, inside functions too."""
    package = [PACKAGE, *module.split("/")[:-1]]
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            around = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*around, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_modules(module: str) -> set[str]:
    """Modules of ours that a module imports."""
    found = set()
    for name in imported_names(module):
        parts = name.split(".")
        if parts[0] == PACKAGE:
            paths = ("/".join(parts[1:end]) for end in range(len(parts), 1, -1))
            found.update(path for path in [next((p for p in paths if p in MODULES), None)] if path)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_lies_below(module: str) -> None:
    wrong = sorted(other for other in imported_modules(module) if not is_allowed(module, other))
    assert not wrong, (
        f"{module} (floor {get_floor(module)}) imports "
        + ", ".join(f"{other} (floor {get_floor(other)})" for other in wrong)
        + ". Move the shared part to a lower floor, or pass it in."
    )


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import circle: {' -> '.join([*path, module])}"
        if module not in finished:
            for other in sorted(imported_modules(module)):
                visit(other, (*path, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


def test_no_folder_imports_one_that_imports_it() -> None:
    arrows = {
        (get_folder(module) or module, get_folder(other) or other)
        for module in MODULES
        for other in imported_modules(module)
    }
    # A folder and those inside of it are one room.
    mutual = sorted(
        (a, b) for a, b in arrows if a < b and (b, a) in arrows and not b.startswith(f"{a}/")
    )
    assert not mutual, f"{mutual[0][0]} and {mutual[0][1]} import each other"


@pytest.mark.parametrize("module", [m for m in MODULES if get_room(m) != "training"])
def test_only_training_imports_megatron_training(module: str) -> None:
    wrong = [name for name in imported_names(module) if f"{name}.".startswith("megatron.training.")]
    assert not wrong, f"{module} imports {wrong[0]}; only training/ may. Pass the value in."


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_package_is_imported_in_one_module(name: str) -> None:
    importers = [m for m in MODULES if any(n.split(".")[0] == name for n in imported_names(m))]
    assert len(importers) <= 1, f"{name} is optional; import it in one of {importers} only"


@pytest.mark.parametrize("folder", sorted({get_folder(module) for module in MODULES}))
def test_every_folder_is_a_package(folder: str) -> None:
    assert (ROOT / folder / "__init__.py").is_file(), f"{folder}/ would be missing in a wheel"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("__init__.py")), ids=lambda p: p.parent.name)
def test_package_files_import_nothing(path: Path) -> None:
    # An import inside a function runs when somebody asks for the name.
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    assert not [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)], (
        f"{path} has imports: whoever needs one module of the folder would load all of them"
    )


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "megatron", "numpy", "transformers", *OPTIONAL)
    code = f"import sys, {PACKAGE}; print(*(set({heavy!r}) & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
