"""YAML from elsewhere: plain values only, and no text that repeats itself into gigabytes."""

from pathlib import Path
from typing import Any

import yaml

_MAX_BYTES = 16 * 2**20
# Values in a file, those of an anchor counted wherever an alias repeats them.
_MAX_NODES = 2**20


def read_yaml(path: Path) -> Any:
    """The value in a YAML file: mappings, lists, texts, numbers, truth values and dates.

    Args:
        path: The file.

    Raises:
        ValueError: It is no YAML, names a class, gives a key twice, contains itself, or is larger
            than what it could mean.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES >> 20} MiB")
    try:
        return yaml.load(content.decode("utf-8"), Loader=BoundedLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


class BoundedLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Refuses aliases that repeat too much, and keys given twice, of which YAML takes the last."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count_nodes(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        self.flatten_mapping(node)
        known = set()
        for name, _ in node.value:
            key = self.construct_object(name, deep=True)
            if isinstance(key, (dict, list, set)):
                continue  # refused by PyYAML itself
            if key in known:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", name.start_mark
                )
            known.add(key)
        return super().construct_mapping(node, deep)


def _count_nodes(node: yaml.Node, counted: dict[int, int | None]) -> int:
    """Number of values in a node; that of an anchor is computed once."""
    known = counted.get(id(node), 0)
    if known is None:
        raise yaml.composer.ComposerError(None, None, "a value contains itself", node.start_mark)
    if known:
        return known
    counted[id(node)] = None
    number = 1
    children = node.value if isinstance(node, yaml.CollectionNode) else ()
    for child in children:
        for each in child if isinstance(child, tuple) else (child,):
            number += _count_nodes(each, counted)
    if number > _MAX_NODES:
        problem = f"aliases repeat more than {_MAX_NODES} values"
        raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
    counted[id(node)] = number
    return number
