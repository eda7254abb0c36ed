"""Strict settings: a plain dictionary (from TOML or JSON) becomes a frozen dataclass, or one clear error.

The dataclasses are the schema, the defaults and the documentation at once. Every problem of a dictionary is
reported together: unknown keys with the nearest known name, missing keys, wrong types, values out of range.
A dataclass checks its own values in `__post_init__`, once their types are right, by raising `ValueError`, or
`ConfigError` with one line a problem. Each line starts with the name of the field.
"""

import contextlib
import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from captioner.errors import ConfigError

Settings = TypeVar("Settings")


def from_dict(kind: type[Settings], values: dict[str, Any], source: str = "settings") -> Settings:
    """Build the dataclass `kind` from `values`.

    Args:
        kind: a dataclass whose fields are bool, int, float, str, `Literal`, `X | None`, `tuple[X, ...]`,
            fixed tuples, or further dataclasses; `dict` and `Any` are taken as they are.
        values: nested dictionaries as `tomllib` or `json` return them; lists become tuples.
        source: what to call the origin in messages, such as a file's name.

    Raises:
        ConfigError: with one line a problem, when there is any.
    """
    problems: list[str] = []
    settings = _build(kind, values, "", problems)
    if problems:
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))
    return settings


def to_dict(settings: Any) -> dict[str, Any]:
    """Return nested dictionaries of JSON types, such that `from_dict` gives equal settings back."""
    return _plain(dataclasses.asdict(settings))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def check_ranges(settings: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse numbers out of range, and those that are no number (NaN); for `__post_init__`.

    Args:
        settings: a dataclass.
        ranges: lowest and highest value by name of the field.

    Raises:
        ValueError: naming the field.
    """
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise ValueError(f"{name}: must be at least {low} and at most {high}, got {_show(value)}")


class _UnusableError(Exception):
    """A value whose problem has been noted already."""


def _build(kind: type, values: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(values, dict):
        problems.append(f"{path or 'the settings'}: expected a table, got {_show(values)}")
        return None
    types_of = get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            problems.append(f"{_join(path, name)}: unknown setting; {hint}")
    arguments = {}
    before = len(problems)  # unknown keys do not keep the known ones from being checked
    for name, field in known.items():
        if name in values:
            try:
                arguments[name] = _convert(types_of[name], values[name], _join(path, name), problems)
            except _UnusableError:
                continue
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(path, name)}: missing")
    if len(problems) > before:
        return None
    try:
        return kind(**arguments)
    except ConfigError as error:
        problems.extend(_join(path, line) for line in str(error).splitlines())
    except ValueError as error:
        problems.append(_join(path, str(error)))
    return None


def _convert(expected: Any, value: Any, path: str, problems: list[str]) -> Any:
    origin = get_origin(expected)
    if dataclasses.is_dataclass(expected):
        return _build(expected, value, path, problems)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [option for option in get_args(expected) if option is not type(None)]
        return _convert(inner, value, path, problems)
    if origin is Literal:
        if any(value == option and type(value) is type(option) for option in get_args(expected)):
            return value
        options = ", ".join(repr(option) for option in get_args(expected))
        return _refuse(f"one of {options}", value, path, problems)
    if origin is tuple:
        return _convert_tuple(expected, value, path, problems)
    if origin is dict or expected is dict:
        return value if isinstance(value, dict) else _refuse("a table", value, path, problems)
    if expected is Any:
        return value
    if expected is float and type(value) is int and abs(value) <= 2**53:  # exact, and cannot overflow
        return float(value)
    if type(value) is not expected:  # `bool` is an `int` to isinstance, and `true` is no number of layers
        return _refuse(_NAMES.get(expected, str(expected)), value, path, problems)
    return value


def _convert_tuple(expected: Any, value: Any, path: str, problems: list[str]) -> tuple:
    items = get_args(expected)
    if not isinstance(value, (list, tuple)):
        _refuse("a list", value, path, problems)
    if items[-1] is Ellipsis:
        if items[0] in _NAMES and all(type(item) is items[0] for item in value):
            return tuple(value)  # thousands of words need no look at each
        items = (items[0],) * len(value)
    elif len(items) != len(value):
        _refuse(f"a list of {len(items)}", value, path, problems)
    converted = []
    for index, (kind, item) in enumerate(zip(items, value, strict=True)):
        with contextlib.suppress(_UnusableError):
            converted.append(_convert(kind, item, f"{path}[{index}]", problems))
    if len(converted) < len(value):
        raise _UnusableError
    return tuple(converted)


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _refuse(expected: str, value: Any, path: str, problems: list[str]) -> Any:
    problems.append(f"{path}: expected {expected}, got {_show(value)}")
    raise _UnusableError


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # Python refuses to write integers of thousands of digits
        return "a value that is too long to print"
    return text if len(text) <= 60 else text[:57] + "..."


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)
