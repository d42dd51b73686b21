"""YAML from files that nobody vouches for: maps, lists, texts, numbers and truth values, as JSON has them.

PyYAML's safe loader makes no objects, but takes two values of one key, dates, and aliases, nine lines of which become
10^9 values. All of these are refused here, and so are tags, endless nesting and long files.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from ditmoe_cli.errors import first_line
from ditmoe_cli.files.json_text import read_file

LONGEST = 4_000_000  # bytes of a file: the reader is slow, half a second for 100,000
_DEEPEST = 64
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_JSON_NUMBER = re.compile(r"[-+]?(\d|[1-9]\d*|\d+\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader without anchors, aliases, tags, dates and merged maps, and with a limit of nesting."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _told(event, "anchors and aliases are not taken; write it out")
        if getattr(event, "tag", None) is not None:
            raise _told(event, f"the tag {event.tag[:60]!r} is not taken; leave it out")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise _told(event, "nested too deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None and node.tag in _NUMBERS and not _JSON_NUMBER.fullmatch(node.value):
            raise _told(
                node, f"{node.value[:60]!r} is a number in YAML's own way; write it as JSON has it, or quote it"
            )
        if node is not None and node.tag not in _TAGS:  # dates, "<<", "="
            raise _told(node, f"{node.value[:60]!r} is no text, number, list or map; put it in quotes")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        del deep
        value: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _told(key_node, "a key is no text")
            key = str(key_node.value)
            if key in value:
                raise _told(key_node, f"the key {key[:60]!r} stands twice in one map")
            value[key] = self.construct_object(value_node, deep=True)
        return value


def _told(where: Any, problem: str) -> ValueError:
    """Return the error of a place in a file, whose lines count from 1."""
    return ValueError(f"line {where.start_mark.line + 1}: {problem}")


def read_yaml(path: Path) -> Any:
    """Return the value of the YAML file at `path`; see `parse_yaml`.

    Raises `OSError` where it cannot be read, and `ValueError` where it is none, or longer than 4 MB.
    """
    return parse_yaml(read_file(path, LONGEST))


def parse_yaml(data: bytes | str) -> Any:
    """Return the value of a YAML text, UTF-8 in bytes; keys are texts, whatever they look like.

    Raises `ValueError` with one line for what is no YAML, or holds a key twice, anchors, aliases, tags, dates, numbers
    that are not finite or that JSON would not have so (1:30 is 90, 010 is 8), or nests more than 64 deep.
    """
    text = data if isinstance(data, str) else data.decode()
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except RecursionError:
        raise ValueError("nested too deep") from None
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        raise ValueError(f"{place}{error.problem or first_line(error)}") from None
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from None
    _require_finite(value)
    return value


def _require_finite(value: object) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is out of range")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _require_finite(inner)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """PyYAML's safe dumper without anchors, maps of plain values on one line where they fit."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


def yaml_text(value: object) -> str:
    """Return a value as YAML, keys in their order, innermost maps and lists on lines of their own."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True
    )
    return text
