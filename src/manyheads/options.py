"""Command-line flags from config dataclasses.

A verb's options are a :class:`~manyheads.config.Config`. Each field becomes a flag: its name with
dashes, its type, its default, and as help the field's entry under "Attributes:" in the class
docstring. A field whose metadata says ``positional`` becomes an argument; a tuple takes values
separated by commas, or the flag several times (``whole``: commas belong to the value); a bool
becomes ``--flag / --no-flag``; ``choices`` in the metadata are enforced. A class with ``presets``,
values by name, has a field ``preset`` that says which of them stand in for the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from manyheads.config import Config

__all__ = ["add_flags", "read_flags", "seconds"]

C = TypeVar("C", bound=Config)
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """Read a duration such as "90", "90s", "5m", "1.5h" in seconds.

    Raises:
        ValueError: not a duration, or not above zero.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(s|m|min|h|)\s*", text)
    if not match:
        raise ValueError(f"{text!r} is no duration: write 90s, 5m or 1h")
    value = float(match.group(1)) * _UNITS[match.group(2)]
    if value <= 0:
        raise ValueError(f"the duration {text!r} must be above zero: write 90s, 5m or 1h")
    return value


def add_flags(parser: argparse.ArgumentParser, options: type[Config]) -> None:
    """Add one flag or argument for each field of a config class."""
    helps: dict[str, str] = {}
    for parent in reversed(options.__mro__):
        helps |= _attribute_helps(parent.__doc__ or "")
    for name, values in _presets(options).items():
        for field_name, value in values.items():
            helps[field_name] = f"{helps.get(field_name, '')} ({name}: {value})"
    hints = typing.get_type_hints(options)
    taken = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(options)}
    for field in dataclasses.fields(options):
        _add_flag(parser, field, hints[field.name], helps.get(field.name, ""), taken)


def read_flags(namespace: argparse.Namespace, options: type[C]) -> C:
    """Build the config from parsed flags; what was not given keeps its default.

    Raises:
        ValueError: a value that the config refuses.
    """
    presets = _presets(options)
    values = dict(presets.get(getattr(namespace, "preset", None) or "", {}))
    for field in dataclasses.fields(options):
        value = getattr(namespace, field.name, None)
        if value is None:
            continue
        if isinstance(value, list):
            value = tuple(v for part in value for v in (part if isinstance(part, list) else [part]))
            if not value and field.default is not dataclasses.MISSING:
                continue
        values[field.name] = value
    return options(**values)


def _presets(options: type[Config]) -> dict[str, dict[str, Any]]:
    return getattr(options, "presets", {})


def _add_flag(
    parser: argparse.ArgumentParser,
    field: dataclasses.Field[Any],
    hint: Any,
    text: str,
    taken: set[str],
) -> None:
    kind, is_tuple = _plain(hint)
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = None if required else field.default
    text = text.replace("%", "%%")
    if default not in (None, (), dataclasses.MISSING) and not isinstance(default, bool):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {shown})"
    arguments: dict[str, Any] = {"help": text, "default": None}
    if choices := field.metadata.get("choices"):
        arguments["choices"] = choices
    if field.metadata.get("positional"):
        arguments["metavar"] = field.name.upper()
        if is_tuple:
            arguments["nargs"] = "+" if required else "*"
        elif not required:
            arguments["nargs"] = "?"
        parser.add_argument(field.name, type=kind, **arguments)
        return
    flag = "--" + field.name.replace("_", "-")
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **arguments)
    elif is_tuple:
        arguments.pop("choices", None)
        metavar = field.name.upper().rstrip("S")
        whole = bool(field.metadata.get("whole"))
        parser.add_argument(
            flag,
            *(s for s in _singular(flag) if s not in taken),
            action="append",
            type=kind if whole else _many(kind),
            metavar=metavar if whole else f"{metavar}[,{metavar}...]",
            dest=field.name,
            **arguments,
        )
    else:
        if kind is float and field.metadata.get("unit") == "seconds":
            kind = seconds
        if "choices" not in arguments:
            arguments["metavar"] = field.metadata.get("metavar", field.name.upper())
        parser.add_argument(flag, type=kind, required=required, **arguments)


def _singular(flag: str) -> list[str]:
    return [flag[:-1]] if flag.endswith("s") else []


def _many(kind: type) -> Any:
    def read(text: str) -> list[Any]:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]

    read.__name__ = f"list of {kind.__name__}"
    return read


def _plain(hint: Any) -> tuple[Any, bool]:
    """Return the type of one value, and whether the field holds several."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _plain(next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        return _plain(arguments[0])[0], True
    if origin is typing.Literal:
        return type(arguments[0]), False
    return (hint if hint in (int, float, str, bool, Path) else str), False


def _attribute_helps(docstring: str) -> dict[str, str]:
    """Read the "Attributes:" section of a docstring: ``name: text``, continued by deeper lines."""
    _, _, section = docstring.partition("Attributes:")
    helps: dict[str, str] = {}
    current: list[str] = []
    for line in section.splitlines():
        match = re.match(r"\s{8}(\w[\w, ]*): (.*)", line)
        if match:
            current = [n.strip() for n in match.group(1).split(",")]
            helps.update(dict.fromkeys(current, match.group(2)))
        elif current and line.startswith(" " * 10):
            helps.update({n: f"{helps[n]} {line.strip()}" for n in current})
        elif line.strip() and not line.startswith(" " * 8):
            break
    return helps
