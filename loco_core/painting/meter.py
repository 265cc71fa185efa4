"""What painting costs, counted on the denoiser: rows that went through it, forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..families import Model
from ..interventions.active import ours

__all__ = ["Cost", "metered"]


@dataclass
class Cost:
    """forward, backward: rows of the denoiser's batches, the unconditional half included. A
    backward row counts as two of `rows`, which is about what it takes."""

    forward: int = 0
    backward: int = 0

    @property
    def rows(self) -> int:
        """Rows forward, and backward ones twice."""
        return self.forward + 2 * self.backward


@contextmanager
def metered(model: Model) -> Iterator[Cost]:
    """Counts what goes through the denoiser of `model` in this context.

    with metered(family_of(pipe)) as cost:
        loco.generate(pipe, ["a star"], steps=8)
    cost.forward  # 16: eight steps, with and without the prompt
    """
    cost = Cost()

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output.sample
        cost.forward += len(x)
        if isinstance(x, Tensor) and x.requires_grad:
            x.register_hook(lambda gradient: back(len(gradient)))

    def back(rows: int) -> None:
        cost.backward += rows

    handle = model.denoiser.register_forward_hook(ours(after))
    try:
        yield cost
    finally:
        handle.remove()
