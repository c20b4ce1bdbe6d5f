"""Which settings does a config have, and what does its code say of each: type, default, meaning?

The meaning is the comment above the field in its dataclass, which the code has for its own readers.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN_TYPES = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", dict: "mapping"}
# The default of a field that has none.
REQUIRED = dataclasses.MISSING


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of a config."""

    # Its place in a YAML: selection.regions.0.kind, where 0 is any entry of a list.
    name: str
    # As the dataclass annotates it.
    annotation: Any
    # REQUIRED where there is none. Of a section with defaults: an instance of its dataclass.
    default: Any
    # Empty where the code has no comment above the field.
    meaning: str
    # The dataclass of the section that it is, or of the entries of its list; None for a value.
    section: type[Any] | None
    is_list: bool


@dataclass(frozen=True, kw_only=True)
class Section:
    """The settings of one dataclass at the places of a config that have it, side by side."""

    # The dotted names of these places; mostly one.
    places: tuple[str, ...]
    # The dataclass.
    kind: type[Any]
    # Whether the place is a list, of which the dataclass is an entry.
    is_list: bool
    # Of every place.
    settings: tuple[Setting, ...]


def sections(root: type[Any]) -> Iterator[Section]:
    """Every section of a config, each before those inside it; the first one is ``root`` itself, with the place ''.

    Args:
        root: a dataclass, whose fields may be dataclasses, or lists of them.
    """
    yield from _sections(("",), root, is_list=False)


def _sections(places: tuple[str, ...], kind: type[Any], *, is_list: bool) -> Iterator[Section]:
    found = tuple(setting for place in places for setting in settings_of(kind, f"{place}.0" if is_list else place))
    yield Section(places=places, kind=kind, is_list=is_list, settings=found)
    inside: dict[tuple[type[Any], bool], list[str]] = {}
    for setting in found:
        if setting.section is not None:
            inside.setdefault((setting.section, setting.is_list), []).append(setting.name)
    for (each, lists), names in inside.items():
        yield from _sections(tuple(names), each, is_list=lists)


def settings_of(kind: type[Any], place: str) -> Iterator[Setting]:
    """The fields of one dataclass, which stands at ``place`` of a config; '' is the top."""
    hints, meanings = get_type_hints(kind), {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            meanings.update(comments(base))
    for field in dataclasses.fields(kind):
        default = field.default if field.default_factory is REQUIRED else field.default_factory()
        section, is_list = _section(hints[field.name])
        yield Setting(
            name=f"{place}.{field.name}" if place else field.name,
            annotation=hints[field.name],
            default=default,
            meaning=meanings[field.name],
            section=section,
            is_list=is_list,
        )


def comments(kind: type[Any]) -> dict[str, str]:
    """The comment that stands right above each field of a dataclass, in one line; empty where there is none."""
    lines = inspect.getsource(inspect.getmodule(kind) or kind).splitlines()
    tree = ast.parse("\n".join(lines))
    found = {}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
    for node in classes[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno - 1
            while lines[first - 1].strip().startswith("#"):
                first -= 1
            text = [line.strip().removeprefix("#").strip() for line in lines[first : node.lineno - 1]]
            found[node.target.id] = " ".join(text)
    return found


def _section(annotation: Any) -> tuple[type[Any] | None, bool]:
    """The dataclass of a section, or of a list's entries, in an annotation, and whether it is the latter."""
    for option in _options(annotation):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option, False
        if get_origin(option) is tuple and dataclasses.is_dataclass(get_args(option)[0]):
            return get_args(option)[0], True
    return None, False


def _options(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)


def in_words(annotation: Any) -> str:
    """A type as YAML has it: ``a list of texts or `null```; names and values are code of Markdown."""
    words: list[str] = []
    for option in _options(annotation):
        words += _words(option)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _words(option: Any) -> list[str]:
    origin = get_origin(option) or option
    if origin is Literal:
        return [f"`{as_yaml(choice)}`" for choice in get_args(option)]
    if option is type(None):
        return ["`null`"]
    if origin is tuple:
        inner = get_args(option)[0]
        return ["list of mappings" if dataclasses.is_dataclass(inner) else f"list of {_PLAIN_TYPES[inner]}s"]
    if dataclasses.is_dataclass(origin):
        return ["mapping"]
    return [_PLAIN_TYPES[origin]]


def as_yaml(value: Any) -> str:
    """A default or a choice as it is written in a config: ``null``, ``1e-08``, ``[]``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(as_yaml(each) for each in value)}]"
    return str(value)


def purpose(kind: type[Any]) -> str:
    """The docstring of a dataclass as Markdown: its paragraphs, without marks of other formats."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", inspect.getdoc(kind) or "")
    return text.replace("``", "`")
