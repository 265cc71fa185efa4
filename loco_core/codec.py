"""Frozen dataclasses as JSON and named tensors, and back by their type hints."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

__all__ = ["decoded", "encoded", "is_stack"]

T = TypeVar("T")
#: The one key of what stands for a tensor.
_VALUE = "$tensor"


def encoded(value: Any, values: dict[str, Any]) -> Any:
    """A dataclass as JSON values; its tensors and pictures are put into `values`, by name.

    Raises TypeError for a value that is neither number, string, None, tensor, pictures, dataclass,
    tuple, list nor mapping with strings as keys.
    """
    return _encoded(value, "", values)


def decoded(cls: type[T], node: Any, values: Mapping[str, Any]) -> T:
    """The dataclass that `encoded` took apart.

    Raises ValueError where the JSON is not what a type hint says, LookupError for a lost tensor.
    """
    return _decoded(cls, node, cls.__name__, values)


def is_stack(value: Any) -> bool:
    """Whether a value is pictures that come one by one, and no tensor."""
    return not isinstance(value, Tensor) and hasattr(value, "shape") and hasattr(value, "dtype")


def _encoded(value: Any, name: str, values: dict[str, Any]) -> Any:
    """A value as JSON; tensors and pictures go to `values` and leave their name."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Tensor) or is_stack(value):
        while name in values:  # a key may hold a dot
            name += "'"
        values[name] = value
        return {_VALUE: name}
    inside = f"{name}." if name else ""
    if dataclasses.is_dataclass(value):
        return {
            f.name: _encoded(getattr(value, f.name), inside + f.name, values)
            for f in dataclasses.fields(value)
            if f.init
        }
    if isinstance(value, Mapping) and all(isinstance(k, str) and k != _VALUE for k in value):
        return {key: _encoded(x, inside + key, values) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(x, f"{inside}{i}", values) for i, x in enumerate(value)]
    raise TypeError(f"{name or 'a result'} is a {type(value).__name__}, which cannot be saved")


def _decoded(hint: Any, node: Any, name: str, values: Mapping[str, Any]) -> Any:
    """The value of a node of JSON, which must be what the type hint says."""
    origin, inside = get_origin(hint), get_args(hint)
    if isinstance(node, dict) and node.keys() == {_VALUE}:
        return _checked(hint, values[node[_VALUE]], name)
    if hint is Any and isinstance(node, dict):
        return {k: _decoded(Any, x, f"{name}.{k}", values) for k, x in node.items()}
    if hint is Any and isinstance(node, list):
        return [_decoded(Any, x, f"{name}.{i}", values) for i, x in enumerate(node)]
    if origin in (Union, UnionType):
        return _first(inside, node, name, values)
    if origin is Literal and node in inside:
        return node
    if dataclasses.is_dataclass(hint) and isinstance(node, dict):
        hints = get_type_hints(hint)
        known = {f.name for f in dataclasses.fields(hint) if f.init}
        if unknown := sorted(node.keys() - known):
            raise ValueError(f"{name} has no {', '.join(unknown)}")
        given = {k: _decoded(hints[k], x, f"{name}.{k}", values) for k, x in node.items()}
        return hint(**given)  # type: ignore[operator]
    if (tuple in (origin, hint) or origin is Sequence) and isinstance(node, list):
        alike = inside[1:] == (...,) or origin is not tuple
        each = (inside or (Any,))[:1] * len(node) if alike else inside
        pairs = zip(each, node, strict=True)
        return tuple(_decoded(h, x, f"{name}.{i}", values) for i, (h, x) in enumerate(pairs))
    if origin is list and isinstance(node, list):
        return [_decoded(inside[0], x, f"{name}.{i}", values) for i, x in enumerate(node)]
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(node, dict):
        return {k: _decoded(inside[1], x, f"{name}.{k}", values) for k, x in node.items()}
    if hint is float and isinstance(node, int) and not isinstance(node, bool):
        return float(node)
    return _checked(hint, node, name)


def _first(hints: tuple[Any, ...], node: Any, name: str, values: Mapping[str, Any]) -> Any:
    """The node as the first of some hints that it fits."""
    for hint in hints:
        with suppress(ValueError, TypeError):
            return _decoded(hint, node, name, values)
    raise ValueError(f"{name} is none of {hints}: {str(node)[:40]}")


def _checked(hint: Any, value: Any, name: str) -> Any:
    try:
        fits = hint is Any or isinstance(value, NoneType if hint is None else hint)
    except TypeError:
        plain = isinstance(value, None | bool | int | float | str | list | dict)
        fits = get_origin(hint) is None and not plain  # a protocol, say
    if not fits or isinstance(value, bool) and hint is not bool and hint is not Any:
        raise ValueError(f"{name} is no {getattr(hint, '__name__', hint)}: {str(value)[:40]}")
    return value
