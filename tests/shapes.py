"""Shapes in signatures are checked under pytest, in the modules named here; users pay nothing.

A function is checked when it has returned, arguments and result together: what it refuses, it
refuses in its own words, and what it lets through has the shapes it promises. (jaxtyping has an
import hook that checks arguments first: it would answer a mistake of a user with one about types.)
"""

import functools
import importlib.machinery
import inspect
import sys
import types
import typing

from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor

MODULES = (
    "loco_core.closed_form.solver",
    "loco_core.judging.clip_score",
    "loco_core.families.base",
    "loco_core.families.latent",
    "loco_core.families.stable_diffusion",
    "loco_core.families.stable_diffusion_xl",
    "loco_core.families.text",
    "loco_core.interventions.patching",
    "loco_core.interventions.routing",
    "loco_core.painting.batch",
    "loco_core.painting.generate",
)


class ShapeError(AssertionError):
    """A value without the shape that a signature promises: a bug of the library."""


def checked(function):
    """`function`, whose tensors must have the shapes of its signature, one size a name."""
    if inspect.isgeneratorfunction(inspect.unwrap(function)):
        return function  # a context manager refuses when it is entered, not when it is called
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args, **kwargs):
        result = function(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        compare(function, given.arguments | {"return": result})
        return result

    # the warnings of the library look for the first line that is not the library's
    run.__code__ = run.__code__.replace(co_filename=function.__code__.co_filename)
    return run


def compare(function, values: dict) -> None:
    """Raise ShapeError unless the tensors among `values` are as `function` is annotated."""
    with jaxtyped("context"):  # in which a name has one size
        for name, hint in hints_of(function).items():
            value = values.get(name)
            allowed = tuple(one for one in alternatives(hint) if is_array(one))
            if isinstance(value, Tensor) and allowed and not isinstance(value, allowed):
                shown = " or ".join(one.__name__ for one in allowed)
                found = f"{value.dtype} {list(value.shape)}"
                raise ShapeError(f"{function.__qualname__}: {name} is {found}, not {shown}")


@functools.cache
def hints_of(function) -> dict:
    return typing.get_type_hints(function, include_extras=True)


def alternatives(hint) -> tuple:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def is_array(hint) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


class Hook(importlib.machinery.PathFinder):
    """Imports the modules above with every function and method checked."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target) if name in MODULES else None
        if spec is not None:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (run(module), check(module))
        return spec


def check(module) -> None:
    for key, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            setattr(module, key, checked(value))
        elif inspect.isclass(value):
            for name, method in list(vars(value).items()):
                if inspect.isfunction(method):
                    setattr(value, name, checked(method))


if not any(finder is Hook for finder in sys.meta_path):
    sys.meta_path.insert(0, Hook)
