"""How is a YAML file read without surprises, and written so that it reads back the same?

Scalars follow YAML 1.2: ``1e-4`` is a number, ``yes`` and ``on`` are words, a date is a word. Keys that occur
twice are refused. ``extends`` merges other files underneath the one that names them.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from sparse_zero.errors import InputError

# Values in a config, far more than any has.
_MAX_SIZE = 100_000
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_RESOLVERS = (
    ("tag:yaml.org,2002:bool", _BOOL, "tTfF"),
    ("tag:yaml.org,2002:int", _INT, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+.0123456789"),
)


class _Loader(yaml.SafeLoader):
    """Safe loader with the YAML 1.2 scalars, which refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = key_node.value
            line = key_node.start_mark.line + 1
            if isinstance(key_node, yaml.ScalarNode) and key in seen and key != "<<":
                raise InputError(f"the key {key!r} stands twice, in lines {seen[key]} and {line}: remove one")
            seen[key if isinstance(key, str) else id(key_node)] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes every word which YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# Line ends of Unicode that YAML folds into spaces unless the text is in double quotes.
_LINE_ENDS = frozenset("\x85\u2028\u2029")


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _LINE_ENDS & set(text) else None)


_Dumper.add_representer(str, _represent_text)


class _BlockDumper(_Dumper):
    """The same, with texts of several lines as they stand, where YAML can hold them so."""


def _represent_block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    if "\n" in text and not _LINE_ENDS & set(text):
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
    return _represent_text(dumper, text)


_BlockDumper.add_representer(str, _represent_block)

# The loader knows only these three, null and the merge key; the dumper knows them besides the 1.1 ones.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Dumper.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))


def parse_yaml(text: str, source: str) -> Any:
    """The content of ``text``; :class:`InputError` names ``source`` and the line of what cannot be read."""
    try:
        value = yaml.load(text, _Loader)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join((error.problem or error.context or "not YAML").split())
        raise InputError(f"{source}, {where}{problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split()) or "nested too deeply"
        raise InputError(f"{source} is not YAML: {problem}") from error
    if _size(value, {}) > _MAX_SIZE:  # Aliases of aliases: a few lines can stand for billions.
        raise InputError(f"{source} has more than {_MAX_SIZE:,} values, aliases written out: it is no config")
    _refuse_foreign(value, source, (), ())
    return value


def _size(value: Any, known: dict[int, int]) -> int:
    """Number of values in ``value``, each as often as it is reached; what contains itself ends there."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = 0
        known[id(value)] = 1 + sum(
            _size(each, known) for each in (value.values() if isinstance(value, dict) else value)
        )
    return known[id(value)]


def dump_yaml(value: Any, *, blocks: bool = False) -> str:
    """``value`` as YAML that :func:`parse_yaml` reads back as an equal value.

    Args:
        value: text, numbers, lists and mappings.
        blocks: write texts of several lines as blocks, as people do.
    """
    dumper = _BlockDumper if blocks else _Dumper
    text: str = yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


# Changes the content of one file, whose folder it is told, before it is merged with that of others.
Prepare = Callable[[dict[str, Any], Path], None]


def read_mapping(path: str | Path, prepare: Prepare | None = None) -> dict[str, Any]:
    """The mapping in the YAML file ``path``, with everything that its ``extends`` names merged underneath.

    ``extends`` is a file name or a list of them, relative to the file that says it. Later files win over
    earlier ones, and the file itself over all: mappings are merged key by key, anything else is replaced.

    Args:
        path: the file.
        prepare: is called with the content of each file; None: nothing is changed.
    """
    return _read(Path(path), (), prepare)


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """``lower`` overlaid with ``upper``: mappings key by key, other values replaced."""
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def read_text(path: Path, what: str) -> str:
    """The text of ``path``, or :class:`InputError` saying why ``what`` cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{what} {path} does not exist: check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{what} {path} is a folder: name a file in it") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} is not a text file in UTF-8") from error
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from error


def names_of_files(value: Any, source: str) -> list[str]:
    """What an ``extends`` says, as a list; :class:`InputError` says that it stands in ``source``."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"extends is {value!r} in {source}: give a file name or a list of file names")
    return names


def _read(path: Path, parents: tuple[Path, ...], prepare: Prepare | None) -> dict[str, Any]:
    what = "the config file" if not parents else f"the file that {parents[-1]} extends,"
    text = read_text(path, what)
    place = path.resolve()
    if place in [parent.resolve() for parent in parents]:
        chain = " -> ".join(str(each) for each in (*parents, path))
        raise InputError(f"extends goes in a circle: {chain}")
    content = parse_yaml(text, str(path))
    if content is None:
        raise InputError(f"{path} is empty: a config is a mapping of sections")
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {_kind(content)} at its top level: a config is a mapping of sections")
    bases = names_of_files(content.pop("extends", []), str(path))
    if prepare is not None:
        prepare(content, path.parent)
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, _read(path.parent / Path(base).expanduser(), (*parents, path), prepare))
    return merge(merged, content)


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}.get(
        type(value), f"a {type(value).__name__}"
    )


def _refuse_foreign(value: Any, source: str, path: tuple[str, ...], above: tuple[int, ...]) -> None:
    """Refuse what no config holds: keys that are no text, tagged objects, aliases that contain themselves."""
    here = ".".join(path) or "the top level"
    if isinstance(value, dict | list):
        if id(value) in above:
            raise InputError(f"{source}: {here} contains itself through an alias")
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in inside:
            if isinstance(value, dict) and not isinstance(key, str):
                raise InputError(f"{source}: the key {key!r} in {here} is no text: put it in quotes")
            _refuse_foreign(item, source, (*path, str(key)), (*above, id(value)))
    elif value is not None and not isinstance(value, str | int | float):
        raise InputError(f"{source}: {here} is {_kind(value)}: use text, numbers, lists and mappings only")
