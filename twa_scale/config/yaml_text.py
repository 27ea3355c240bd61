"""Parse YAML with limits on depth and on the number of values, including those that aliases repeat."""

import re
from typing import Any, NoReturn

import yaml
from yaml.composer import ComposerError
from yaml.nodes import Node

from twa_scale.base.inputs import MAX_DEPTH

_MAX_NODES = 20_000  # a list of ten thousand candidates fits
_MAX_SCALAR = 10_000  # characters


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the numbers of YAML 1.2 and with limits on depth and number of nodes.

    YAML 1.1 reads `3e-3` as text. A node that an alias repeats counts for each repetition, since consumers copy it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0
        self._unfinished: list[str | None] = []
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Compose a node like PyYAML, and count it."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            return self._repeated(event, super().compose_node(parent, index))
        self._depth += 1
        self._count(1, event)
        if self._depth > MAX_DEPTH:
            _refuse(f"it is nested more than {MAX_DEPTH} levels deep", event.start_mark)
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _MAX_SCALAR:
            _refuse(f"a value has more than {_MAX_SCALAR} characters", event.start_mark)
        before = self._nodes
        self._unfinished.append(event.anchor)
        node = super().compose_node(parent, index)
        self._unfinished.pop()
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[id(node)] = self._nodes - before + 1
        return node

    def _repeated(self, event: Any, node: Node | None) -> Node | None:
        if event.anchor in self._unfinished:
            _refuse(f"the alias *{event.anchor} is inside its own value", event.start_mark)
        self._count(self._sizes[id(node)], event)
        return node

    def _count(self, more: int, event: Any) -> None:
        self._nodes += more
        if self._nodes > _MAX_NODES:
            _refuse(f"it holds more than {_MAX_NODES} values, counting what aliases repeat", event.start_mark)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a duplicate key, of which SafeLoader would use the last one."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line, node_key = key.start_mark.line + 1, (key.tag, key.value)
            if node_key in lines and key.tag != "tag:yaml.org,2002:merge":
                _refuse(f"key {key.value!r} is given twice, in lines {lines[node_key]} and {line}; keep one", None)
            lines[node_key] = line
        return node


def _refuse(problem: str, mark: Any) -> NoReturn:
    raise ComposerError(None, None, problem, mark)


# YAML 1.1 reads 0100 as 64, and 1:30 as 90.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:int"]
    for first, known in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """Parse YAML as plain data.

    Raises:
        ValueError: the text is malformed or too large.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except (RecursionError, AttributeError, KeyError, IndexError, TypeError, OverflowError) as error:
        # PyYAML raises these for a scalar that does not fit its tag.
        raise ValueError(f"{type(error).__name__}: {error}") from error
