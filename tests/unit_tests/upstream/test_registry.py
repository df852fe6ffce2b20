"""The registry of what is replaced in Megatron."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.errors import UserError
from trinity_megatron.upstream.__main__ import render
from trinity_megatron.upstream.entries import REGISTRY
from trinity_megatron.upstream.registry import check_upstream, replaced
from trinity_megatron.upstream.replacement import Replacement

enter_host()
ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "trinity_megatron"
UPSTREAM = ("megatron", "torch", "tensorboard")


def test_the_installed_megatron_is_the_one_of_the_registry() -> None:
    assert check_upstream(REGISTRY.values()) == []


def test_a_changed_function_is_refused_by_name() -> None:
    target = "megatron.training.training:train_step"
    changed = Replacement(target, "callbacks", fingerprint="0123456789ab")
    missing = Replacement(f"{target}_of_old", "callbacks", fingerprint="0123456789ab")
    for entry in (changed, missing):
        with pytest.raises(UserError, match=rf"{entry.target} \(callbacks\).*Remedy"):
            check_upstream([*REGISTRY.values(), entry])
        assert len(check_upstream([entry], allow_changes=True)) == 1


def test_one_changed_line_of_a_copy_is_refused(tmp_path: Path) -> None:
    """A copy of one module of the wheel, in front of it on the path."""
    from megatron.training import training

    source = Path(training.__file__).read_text()
    line = re.search(r"def train_step\(.*?\n    \"\"\".*?\n", source, re.DOTALL)
    assert line is not None
    (tmp_path / "training.py").write_text(source.replace(line[0], f"{line[0]}    changed = 1\n"))
    code = (
        "from trinity_megatron.cpu_host.cuda_stand_ins import enter_host; enter_host()\n"
        "import megatron.training as package\n"
        f"package.__path__.insert(0, {str(tmp_path)!r})\n"
        "import sys; sys.modules.pop('megatron.training.training', None)\n"
        "from trinity_megatron.upstream.entries import REGISTRY\n"
        "from trinity_megatron.upstream.registry import check_upstream\n"
        "print(*check_upstream(REGISTRY.values(), allow_changes=True), sep='\\n')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    names = [text for text in result.stdout.splitlines() if text.startswith("megatron.")]
    assert [name.partition(" ")[0] for name in names] == ["megatron.training.training:train_step"]


def test_a_replacement_ends_with_its_block() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    name = "_compute_per_buffer_param_layout"
    before = vars(DistributedOptimizer)[name]
    target = f"megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.{name}"
    with pytest.raises(ZeroDivisionError), replaced(target, lambda old: lambda *args: (old, args)):
        assert isinstance(vars(DistributedOptimizer)[name], staticmethod)
        assert DistributedOptimizer._compute_per_buffer_param_layout(1)[1] == (1,)
        raise ZeroDivisionError
    assert vars(DistributedOptimizer)[name] is before


def test_what_is_not_registered_cannot_be_replaced() -> None:
    with (
        pytest.raises(AssertionError, match="megatron.core.mpu:get"),
        replaced("megatron.core.mpu:get", lambda old: old),
    ):
        pass


def test_the_readme_of_the_patches_is_the_registry() -> None:
    assert (ROOT / "patches" / "README.md").read_text() == render()


def assigned_upstream(path: Path) -> list[str]:
    """Assignments to attributes of modules or classes that were imported from upstream."""
    tree = ast.parse(path.read_text())
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] in UPSTREAM
    }
    found = []
    for node in ast.walk(tree):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for target in targets if isinstance(node, ast.Assign | ast.AugAssign) else []:
            base = target
            while isinstance(base, ast.Attribute | ast.Subscript):
                base = base.value
            if base is not target and isinstance(base, ast.Name) and base.id in imported:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
        if isinstance(node, ast.Global):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: global")
    return found


# The stand-ins for CUDA change torch for the whole process; each has its reason there.
@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent.name != "cpu_host"],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_nothing_else_is_assigned_in_upstream(path: Path) -> None:
    assert assigned_upstream(path) == []
