"""What a module is handed and what it returns, noted while a pipeline runs: the one recorder."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from .active import ours

__all__ = ["recording"]

T = TypeVar("T")


@contextmanager
def recording(
    module: nn.Module, keep: Callable[[tuple, Mapping[str, Any], Any], T]
) -> Iterator[list[T]]:
    """keep(args, kwargs, output) of every call of `module` in this context, in order.

    keep: what is kept of a call, such as some rows: a whole batch is not held unless it is. On
    exit, also by an exception, the hook is gone. The list is empty if the module did not run, or
    runs compiled and ignores hooks.

        with recording(linear, lambda args, kwargs, output: args[0].detach()) as inputs:
            model.encode(["a star"])
    """
    seen: list[T] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen.append(keep(args, kwargs, output))

    handle = module.register_forward_hook(ours(hook), with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
