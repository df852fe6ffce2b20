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

# Module -> level.  "folder/*" stands for the modules of a folder that are not named themselves.
LEVELS = {
    # 0: arithmetic and formats; nothing of ours below.
    "host": 0,
    "cpu_matmul": 0,
    "cpu_memory": 0,
    "version": 0,
    "process": 0,
    "replaced": 0,
    "fp8": 0,
    "flex_attention": 0,
    "moe/expert_bias": 0,
    "moe/balance_loss": 0,
    "moe/unstack": 0,
    "optimizer/newton_schulz": 0,
    "optimizer/syrk": 0,
    "optimizer/ownership": 0,
    "optimizer/sharded_state": 0,
    "data/*": 0,
    "checkpoint/transforms": 0,
    "checkpoint/verify_flags": 0,
    "tracking/moe_metrics": 0,
    "tracking/statistics": 0,
    # 1: parts of the model and of the optimizer.
    "config": 1,
    "flops": 1,
    "attention": 1,
    "norms": 1,
    "initialization": 1,
    "transformer_layer": 1,
    "loss": 1,
    "moe/router": 1,
    "moe/experts": 1,
    "moe/te_experts": 1,
    "moe/token_dispatcher": 1,
    "moe/moe_layer": 1,
    "moe/finalize": 1,
    "optimizer/exchange": 1,
    "optimizer/muon": 1,
    "optimizer/param_groups": 1,
    "checkpoint/hf_config": 1,
    # 2: wiring.
    "presets": 2,
    "layer_specs": 2,
    "optimizer/layout": 2,
    "optimizer/distributed": 2,
    "optimizer/plan": 2,
    "optimizer/builder": 2,
    "checkpoint/*": 2,
    "tracking/*": 2,
    # 3: Megatron's training.
    "training/*": 3,
    "memory": 3,
    # 4: what a user starts.
    "launcher": 4,
    "gpu_check/*": 4,
    "cli": 5,
}
OPTIONAL = ("transformer_engine", "apex", "wandb", "emerging_optimizers")
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix()
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py"
)


def get_level(module: str) -> int:
    for key in (module, f"{module.rpartition('/')[0]}/*"):
        if key in LEVELS:
            return LEVELS[key]
    raise AssertionError(
        f"{PACKAGE}/{module}.py has no level. Add it to LEVELS in {Path(__file__).name}, as low as "
        "its imports allow."
    )


def get_folder(module: str) -> str:
    return module.rpartition("/")[0]


def is_allowed(importer: str, imported: str) -> bool:
    """Lower levels; on the same level, the own folder and those around it."""
    if get_level(imported) != get_level(importer):
        return get_level(imported) < get_level(importer)
    folder = get_folder(imported)
    return folder in ("", get_folder(importer))


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
        f"{module} (level {get_level(module)}) imports "
        + ", ".join(f"{other} (level {get_level(other)})" for other in wrong)
        + ". Move the shared part to a lower level, or pass it in."
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


@pytest.mark.parametrize("module", [m for m in MODULES if get_folder(m) != "training"])
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
