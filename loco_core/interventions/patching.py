"""Activations copied from one row of a batch to others: the intervention of causal tracing.

One convention (baukit's): a batch carries its own clean run as one of its rows, and a forward hook
on a module copies that row's output into other rows. Nothing is cached: the clean activation is
there when it is needed, at every step, and the batch can be cut in chunks that each have a clean
row. A row may be patched at other modules than its neighbour, so that many sites are one batch.

    edits = copies({2: [(0, unet.mid_block.resnets[0], None)]})    # row 2 gets row 0's output
    with rewriting(edits):
        noise = unet(latents, 500, encoder_hidden_states=text).sample
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..families.checks import refuse_compiled
from .active import ours

Rewrite = Callable[[Tensor], Tensor]
Place = tuple[int, nn.Module, int | None]  # source row, module, token of its output (None: all)


@contextmanager
def rewriting(
    edits: Mapping[nn.Module, Rewrite],
    network: nn.Module | None = None,
    calls: Collection[int] | None = None,
    says: Any = None,
) -> Iterator[None]:
    """Within this context the output of each module m is edits[m](output).

    Of a module that returns a tuple, the first entry is rewritten. calls: the calls of `network`,
    counted from 0 in this context, during which outputs are rewritten; all of them by default.
    says: what the rewrites do, in JSON or as a function that tells it, for a store of pictures;
    without it they are foreign to one.
    On exit, also by an exception, the hooks set here are gone and no other hook was touched.
    Raises ValueError for a compiled network (it would ignore the hooks), and RuntimeError if a
    module was not called in the context (but `network`, if named, was): nothing was rewritten.
    """
    call, called, handles = -1, set(), []

    def count(module: nn.Module, args: tuple) -> None:
        nonlocal call
        call += 1

    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        called.add(module)
        if calls is not None and call not in calls:
            return None
        if isinstance(output, tuple):
            return edits[module](output[0]), *output[1:]
        return edits[module](output)

    try:
        if edits and network is not None:
            refuse_compiled(network)
            handles.append(network.register_forward_pre_hook(ours(count)))
        if says is not None:
            ours(hook, says)
        handles += [module.register_forward_hook(hook) for module in edits]
        yield
    finally:
        for handle in handles:
            handle.remove()
    idle = [type(module).__name__ for module in edits if module not in called]
    if idle and (network is None or call >= 0):
        raise RuntimeError(
            f"{len(idle)} of {len(edits)} modules to patch ({', '.join(sorted(set(idle)))}) did "
            "not run, or run compiled and ignore hooks: load the pipeline again, do not compile it"
        )


def copies(places: Mapping[int, Sequence[Place]]) -> dict[nn.Module, Rewrite]:
    """Rewrites that give row b, at each of places[b], the output of another row.

    places: batch row -> (row it is copied from, module, token of the output or None for all of
    it). The outputs are [row, ...], with tokens [row, token, ...].
    """
    found: dict[nn.Module, list[tuple[int, int, int | None]]] = {}
    for row, triples in places.items():
        for source, module, token in triples:
            found.setdefault(module, []).append((row, source, token))
    return {module: _copy(triples) for module, triples in found.items()}


def _copy(triples: Sequence[tuple[int, int, int | None]]) -> Rewrite:
    whole = [(row, source) for row, source, token in triples if token is None]
    at = [(row, source, token) for row, source, token in triples if token is not None]
    index = [torch.tensor(column) for pairs in (whole, at) for column in zip(*pairs, strict=True)]

    def rewrite(x: Tensor) -> Tensor:
        columns = [column.to(x.device, non_blocking=True) for column in index]
        clean, x = x, x.clone()
        if whole:
            rows, sources = columns[:2]
            x[rows] = clean[sources]
        if at:
            rows, sources, tokens = columns[-3:]
            x[rows, tokens] = clean[sources, tokens]
        return x

    return rewrite


def added(noise: Mapping[int, tuple[int, Tensor]], rows: int) -> Rewrite:
    """A rewrite that adds to row b of an output noise [token, width], from a token on.

    noise: batch row -> (first token, noise). rows: of the batch. Raises ValueError for an output
    with another number of rows.
    """

    def rewrite(x: Tensor) -> Tensor:
        if len(x) != rows:
            raise ValueError(
                f"noise of {rows} rows meets a batch of {len(x)}: the text encoder was not called "
                "once with all prompts"
            )
        x = x.clone()
        for row, (first, drawn) in noise.items():
            x[row, first : first + len(drawn)] += drawn.to(x)
        return x

    return rewrite
