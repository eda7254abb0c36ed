"""Strict settings: convert a plain dictionary (from TOML or JSON) to a frozen dataclass, or raise one clear error.

The dataclasses are the schema, the defaults and the documentation. All problems of a dictionary are reported
together: unknown keys with the closest known name, missing keys, wrong types, values out of range. Ranges of
numbers are part of the type, `Annotated[float, Range(0, 1)]`. A dataclass that is also built directly calls `check`
in its `__post_init__`, and raises `ValueError` itself for fields that contradict each other. Messages begin with
the name of the field.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import json
import textwrap
import types
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from captioner.errors import ConfigError

Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number."""

    low: float
    high: float
    exclude: Literal["low", "high", None] = None
    """The bound that is not in the range itself."""

    def __contains__(self, value: float) -> bool:
        excluded = self.exclude and getattr(self, self.exclude)
        return self.low <= value <= self.high and value != excluded  # NaN is not

    def __str__(self) -> str:
        low = "above" if self.exclude == "low" else "at least"
        high = "below" if self.exclude == "high" else "at most"
        return f"{low} {self.low} and {high} {self.high}"


def from_dict(kind: type[Settings], values: dict[str, Any], source: str = "settings") -> Settings:
    """Build the dataclass `kind` from `values`.

    Args:
        kind: a dataclass whose fields are bool, int, float, str, `Literal`, `X | None`, `tuple[X, ...]`, fixed
            tuples, `Annotated[X, Range(...)]`, or further dataclasses; a `dict[...]` is not converted.
        values: nested dictionaries as `tomllib` or `json` return them; lists become tuples.
        source: name of the origin for messages, such as a file name.

    Raises:
        ConfigError: with one line per problem.
    """
    problems: list[str] = []
    settings: Settings = _build(kind, values, "", problems)
    if problems:
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))
    return settings


def check(settings: Any) -> None:
    """Check types and ranges of the fields of a dataclass, for its `__post_init__`; lists become tuples.

    Raises:
        ValueError: for the first invalid field.
    """
    problems: list[str] = []
    for name, kind in _types(settings.__class__).items():
        with contextlib.suppress(_InvalidError):
            object.__setattr__(settings, name, _convert(kind, getattr(settings, name), name, problems))
    if problems:
        raise ValueError(problems[0])


def to_dict(settings: Any) -> dict[str, Any]:
    """Return nested dictionaries of JSON types, the inverse of `from_dict`."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return values


def field_docs(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass on one line, by the name of the field."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, doc in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            docs[ast.unparse(field.target)] = " ".join(str(doc.value.value).split())
    return docs


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


class _InvalidError(Exception):
    """A value whose problem is recorded already."""


def _build(kind: type, values: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(values, dict):
        problems.append(f"{path or 'the settings'}: expected a table, got {_show(values)}")
        return None
    types_of = _types(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            problems.append(f"{_join(path, name)}: unknown setting; {hint}")
    arguments = {}
    unknown = len(problems)
    for name, field in known.items():
        if name in values:
            try:
                arguments[name] = _convert(types_of[name], values[name], _join(path, name), problems)
            except _InvalidError:
                continue
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(path, name)}: missing")
    if len(problems) > unknown:
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
    if origin is Annotated:
        kind, bounds = get_args(expected)
        number = _convert(kind, value, path, problems)
        if number not in bounds:
            problems.append(f"{path}: must be {bounds}, got {_show(value)}")
            raise _InvalidError
        return number
    if dataclasses.is_dataclass(expected):
        if isinstance(value, expected):  # type: ignore[arg-type]
            return value
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
    if origin is dict:
        return value if isinstance(value, dict) else _refuse("a table", value, path, problems)
    if expected is float and type(value) is int and abs(value) <= 2**53:  # exact, and cannot overflow
        return float(value)
    if type(value) is not expected:  # not isinstance: `True` is an `int`
        return _refuse(_NAMES.get(expected, str(expected)), value, path, problems)
    return value


def _convert_tuple(expected: Any, value: Any, path: str, problems: list[str]) -> tuple[Any, ...]:
    items = get_args(expected)
    if not isinstance(value, (list, tuple)):
        _refuse("a list", value, path, problems)
    if items[-1] is Ellipsis:
        if items[0] in _NAMES and all(type(item) is items[0] for item in value):
            return tuple(value)  # faster for thousands of words
        items = (items[0],) * len(value)
    elif len(items) != len(value):
        _refuse(f"a list of {len(items)}", value, path, problems)
    converted = []
    for index, (kind, item) in enumerate(zip(items, value, strict=True)):
        with contextlib.suppress(_InvalidError):
            converted.append(_convert(kind, item, f"{path}[{index}]", problems))
    if len(converted) < len(value):
        raise _InvalidError
    return tuple(converted)


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _refuse(expected: str, value: Any, path: str, problems: list[str]) -> Any:
    problems.append(f"{path}: expected {expected}, got {_show(value)}")
    raise _InvalidError


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # Python refuses to write integers of thousands of digits
        return "a value too long to print"
    return text if len(text) <= 60 else text[:57] + "..."


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)
