"""Print ``patches/README.md``: ``python -m trinity_megatron.upstream > patches/README.md``.

``python -m trinity_megatron.upstream --fingerprints`` prints those of the installed Megatron-Core,
for a change of the supported release.
"""

import sys

from trinity_megatron.upstream.entries import REGISTRY
from trinity_megatron.upstream.registry import fingerprint

_HEAD = """\
# Patches to Megatron-Core

Our trainings need no file of Megatron-Core patched.  A need is met by a config field, a spec slot,
a subclass hook or a callback; where none reaches, an attribute is replaced while a training runs.
These are all such replacements.  A training refuses a Megatron-Core whose source of one of them
differs (`--allow-upstream-changes` trains all the same).  Stand-ins for CUDA on a CPU are in
`trinity_megatron/cpu_host/`.

A script of Megatron-LM that is started directly, without `trinity-megatron run`, has none of these.
On the wheel it needs one patch; its head says why, how to apply it and how to check it:

* [0001-datasets-no-make-without-makefile.patch](0001-datasets-no-make-without-makefile.patch): the
  wheel has the compiled dataset helper but no Makefile, and `compile_helpers()` ends the process.

This file is generated: `python -m trinity_megatron.upstream > patches/README.md`.

| attribute | why | fingerprint |
|---|---|---|"""


def render() -> str:
    """The text of ``patches/README.md``."""
    rows = []
    for entry in REGISTRY.values():
        of = f" of `{entry.source_of}`" if entry.source_of else ""
        mark = f"`{entry.fingerprint}`{of}" if entry.fingerprint else ""
        rows.append(f"| [`{entry.target}`]({entry.link}) | {entry.reason} | {mark} |")
    return "\n".join([_HEAD, *rows]) + "\n"


def _print_fingerprints() -> None:
    for entry in REGISTRY.values():
        print(entry.target, fingerprint(entry))


if __name__ == "__main__":
    if sys.argv[1:] == ["--fingerprints"]:
        _print_fingerprints()
    else:
        print(render(), end="")
