"""Painting in another process: it loads the pipeline, and must find the same state.

An order says how `loco.load` made the pipeline, which contexts of ours are open on it, which
scheduler it has, and what state comes out of that. The other process does the same and compares, so
it paints the same pictures or none.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .. import zoo
from ..families import Model, family_of
from ..interventions.active import reopened
from ..records import Source, model_name, source_of
from .brush import painted
from .picture import Picture, Sampling
from .state import differences, state_of
from .store import Store, sealed

__all__ = ["Order", "paint_there"]


@dataclass(frozen=True)
class Order:
    """What another process is told; small, and made of values."""

    source: Source
    scheduler: tuple[str, str]  # class, config as sorted JSON
    contexts: tuple[Callable[[Any], Any], ...]
    state: tuple[tuple[str, str], ...]
    seal: str
    sampling: Sampling
    store: Store

    @classmethod
    def of(cls, pipe: Any, sampling: Sampling, store: Store | None, state: Any) -> "Order":
        """The order for what `pipe` would paint now. Raises ValueError for a pipeline that
        `loco.load` did not make."""
        source = source_of(pipe)
        if source is None or store is None:
            raise ValueError(
                f"another process cannot load this {type(pipe).__name__}: it was not made by "
                "loco.load. Save it, pipe.save_pretrained(folder), and pass loco.load(folder)"
            )
        kept = tuple((k, sealed({"": v})) for k, v in state.items())
        scheduler = type(pipe.scheduler).__name__, pipe.scheduler.to_json_string()
        return cls(source, scheduler, reopened(pipe), kept, sealed(state), sampling, store)


#: Seals of the orders whose state was found here, on the pipeline that is loaded.
_known: set[str] = set()


def paint_there(order: Order, batch: Sequence[Picture]) -> int:
    """Paint a batch into the store of `order`, in the process that calls this; how many it were.

    The pipeline is loaded once and kept for the next batch. Raises ValueError if its state is not
    that of the order.
    """
    pipe = _loaded(order.source)
    model = family_of(pipe)
    pipe.scheduler = _scheduler(*order.scheduler)
    with ExitStack() as stack:
        for context in order.contexts:
            stack.enter_context(context(pipe))
        if order.seal not in _known:  # one pass over the weights an order, not one a batch
            _check(model, order)
            _known.add(order.seal)
        keys = {p: order.store.key(order.seal, order.sampling, p) for p in batch}
        missing = [p for p in batch if not order.store.has(keys[p])]
        if missing:
            painted(model, order.sampling, missing, order.store, keys)
    return len(batch)


def _check(model: Model, order: Order) -> None:
    state = state_of(model, order.store.tag)
    if sealed(state) != order.seal:
        here = {k: sealed({"": v}) for k, v in state.items()}
        raise ValueError(
            f"{model_name(model.pipe)} as another process loads it differs in "
            f"{', '.join(differences(here, dict(order.state)))} from the pipeline that was "
            "passed: save that one, pipe.save_pretrained(folder), and pass loco.load(folder)"
        )


@lru_cache(maxsize=1)
def _loaded(source: Source) -> Any:
    _known.clear()
    # a worker sees one GPU, its own, whichever the caller's was
    device = "cuda" if source.device is not None and source.device.type == "cuda" else source.device
    return zoo.load(
        source.folder or source.name, device=device, dtype=source.dtype,
        revision=None if source.folder else source.revision, variant=source.variant,
    )  # fmt: skip


def _scheduler(name: str, config: str) -> Any:
    import diffusers

    return getattr(diffusers, name).from_config(json.loads(config))
