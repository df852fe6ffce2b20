"""Task files of ``--data DIR`` are data: no program that they name or bring along is run.

lm-evaluation-harness takes them for programs: ``!function`` runs Python beside the file, a metric
that it does not know is a script of that name, and a template reaches every object of the process.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from jinja2.sandbox import SandboxedEnvironment

from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.yaml_file import BoundedLoader
from trinity_megatron.upstream.registry import replaced

_REMEDY = (
    "Remedy: a task without it; or export the model, and run lm_eval on that, where you trust the "
    "task's author."
)


@contextmanager
def plain_task_files() -> Iterator[None]:
    """Run nothing of a task file while the block runs; tasks of the harness itself are code of it.

    Raises:
        UserError: A task needs a program; names it.
    """
    with ExitStack() as stack:
        for target, make in (
            ("lm_eval.tasks._yaml_loader:_make_loader", _bounded_loader),
            ("lm_eval.api.task:get_metric", _known_metric),
            ("lm_eval.utils:env", _sandboxed),
        ):
            stack.enter_context(replaced(target, make))
        yield


def _bounded_loader(make_loader: Callable[..., Any]) -> Callable[..., Any]:
    """The harness's loader for its own files, and one that calls nothing for others."""
    own = Path(inspect.getfile(make_loader)).resolve().parent

    def make(base_dir: Path, *, resolve_funcs: bool) -> Any:
        if base_dir.resolve().is_relative_to(own):
            return make_loader(base_dir, resolve_funcs=resolve_funcs)

        class Loader(BoundedLoader):
            """Loads the files of a folder."""

        def name_function(loader: Any, node: yaml.ScalarNode) -> str:
            if resolve_funcs:
                raise UserError(
                    f"{base_dir} has a task with !function {node.value!s:.100}, which runs a "
                    f"program. {_REMEDY}"
                )
            return str(node.value)

        Loader.add_constructor("!function", name_function)
        return Loader

    return make


def _known_metric(get_metric: Callable[..., Any]) -> Callable[..., Any]:
    """``get_metric`` that loads no script of the package ``evaluate``."""
    known = inspect.getmodule(inspect.unwrap(get_metric)).metric_registry  # type: ignore[union-attr]

    def get(name: str, hf_evaluate_metric: bool = False) -> Any:
        if hf_evaluate_metric or name not in known:
            raise UserError(
                f"The metric {name!s:.100} of a task is a program that the package evaluate would "
                f"load by this name. {_REMEDY}"
            )
        return get_metric(name)

    return get


def _sandboxed(environment: Any) -> SandboxedEnvironment:
    """The harness's environment of templates, without a way to what is behind a value."""
    sandbox = SandboxedEnvironment(
        loader=environment.loader,
        undefined=environment.undefined,
        keep_trailing_newline=environment.keep_trailing_newline,
    )
    sandbox.filters.update(environment.filters)
    return sandbox
