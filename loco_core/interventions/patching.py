"""Activations copied from one row of a batch to others: the intervention of causal tracing.

One convention (baukit's): a batch carries its own clean run as one of its rows, and a forward hook
on a module copies that row's output into other rows. Nothing is cached: the clean activation is
there when it is needed, at every step, and the batch can be cut in chunks that each have a clean
row. A row may be patched at other modules than its neighbour, so that many sites are one batch.

    edits = copies(0, {2: [(unet.mid_block.resnets[0], None)]})    # row 2 gets row 0's output
    with rewriting(edits):
        noise = unet(latents, 500, encoder_hidden_states=text).sample
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor, nn

from .routing import refuse_compiled

Rewrite = Callable[[Tensor], Tensor]
Place = tuple[nn.Module, int | None]  # a module and a token of its output; None: all of it


@contextmanager
def rewriting(
    edits: Mapping[nn.Module, Rewrite],
    network: nn.Module | None = None,
    calls: Collection[int] | None = None,
) -> Iterator[None]:
    """Within this context the output of each module m is edits[m](output).

    Of a module that returns a tuple, the first entry is rewritten. calls: the calls of `network`,
    counted from 0 in this context, during which outputs are rewritten; all of them by default.
    On exit, also by an exception, the hooks set here are gone and no other hook was touched.
    Raises ValueError for a compiled network (it would ignore the hooks), and RuntimeError if a
    module was not called in the context: nothing of it was rewritten.
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
            handles.append(network.register_forward_pre_hook(count))
        handles += [module.register_forward_hook(hook) for module in edits]
        yield
    finally:
        for handle in handles:
            handle.remove()
    if idle := [type(module).__name__ for module in edits if module not in called]:
        raise RuntimeError(
            f"{len(idle)} of {len(edits)} modules to patch ({', '.join(sorted(set(idle)))}) did "
            "not run, or run compiled and ignore hooks: load the pipeline again, do not compile it"
        )


def copies(source: int, places: Mapping[int, Sequence[Place]]) -> dict[nn.Module, Rewrite]:
    """Rewrites that give row b, at each of places[b], the output of row `source`.

    places: batch row -> pairs of a module and a token of its output, or None for all of it. The
    outputs are [row, ...], with tokens [row, token, ...].
    """
    found: dict[nn.Module, list[tuple[int, int | None]]] = {}
    for row, pairs in places.items():
        for module, token in pairs:
            found.setdefault(module, []).append((row, token))
    return {module: _copy(source, pairs) for module, pairs in found.items()}


def _copy(source: int, pairs: Sequence[tuple[int, int | None]]) -> Rewrite:
    whole = [row for row, token in pairs if token is None]
    at = [(row, token) for row, token in pairs if token is not None]

    def rewrite(x: Tensor) -> Tensor:
        clean, x = x[source], x.clone()
        if whole:
            x[whole] = clean
        if at:
            rows, tokens = map(list, zip(*at, strict=True))
            x[rows, tokens] = clean[tokens]
        return x

    return rewrite


def added(noise: Float[Tensor, "row token width"], first: int) -> Rewrite:
    """A rewrite that adds noise [row, token, width] to an output, from token `first` on.

    Raises ValueError for an output with another number of rows.
    """

    def rewrite(x: Tensor) -> Tensor:
        if len(x) != len(noise):
            raise ValueError(
                f"noise of {len(noise)} rows meets a batch of {len(x)}: the text encoder was not "
                "called once with all prompts"
            )
        x = x.clone()
        x[:, first : first + noise.shape[1]] += noise.to(x)
        return x

    return rewrite
