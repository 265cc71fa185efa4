"""Which text a layer reads, row by row: the intervention of LocoGen (arXiv 2405.01008, sec. 3).

A source map src [row, layer] says that row b of a batch reads, at text layer l, the text number
src[b, l] of a table of encoded prompts. A sweep over windows is then one batch: every row has the
original prompt everywhere but in its own window of layers.

A forward pre-hook on the attention module replaces `encoder_hidden_states` (and the attention
mask, if the texts have one). It works under any attention processor, where a hook on `to_k` or a
wrapped processor would be bypassed or replaced.

The texts come from a table, not from other rows of the batch, so a batch can be cut in chunks
anywhere. This is exact for families whose layers all read the same text states.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor, nn

from ..families import TextStates, family_of
from ..families.checks import refuse_compiled, whole_number
from .active import ours, says_tensor


@contextmanager
def routed(
    pipe: Any,
    texts: TextStates,
    src: Int[Tensor, "row layer"] | Sequence[Sequence[int]],
    rows: Int[Tensor, " row"] | None = None,
) -> Iterator[None]:
    """Within this context, row rows[b] of the denoiser's batch reads texts[src[b, l]] at layer l.

    src: [row, layer] long, values index `texts`. rows: [row] long, the place of each routed row in
    the denoiser's batch, by default 0, 1, ...; under classifier-free guidance the batch is
    [negative..., positive...], see `Model.conditional_rows`. Rows not named read what they did.
    On exit, also by an exception, the hooks set here are gone and no other hook was touched.
    Raises ValueError on a map that does not fit the pipeline, a compiled denoiser (it would
    ignore the hooks) and fused projections.

        texts = family_of(pipe).encode(["a star", "a cat"])
        src = torch.zeros(1, 16, dtype=torch.long)
        src[0, 6:8] = 1
        with routed(pipe, texts, src):
            noise = pipe.unet(latents, 500, encoder_hidden_states=texts.embeds[:1]).sample
    """
    model = family_of(pipe)
    layers = model.text_layers
    refuse_compiled(model.denoiser)
    src = checked_map(src, len(layers), len(texts))
    rows = torch.arange(len(src)) if rows is None else rows
    if rows.shape != (len(src),):
        raise ValueError(
            f"rows has shape {tuple(rows.shape)} for {len(src)} rows of src: name one "
            "place in the denoiser's batch for each"
        )
    rows = rows.to(texts.embeds.device)
    modules = [model.attention(layer) for layer in layers]
    handles = []
    try:
        for module, column in zip(modules, src.T.to(rows.device), strict=True):
            hook = ours(_reads(texts, column, rows), _says(texts, column, rows))
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reads(texts: TextStates, column: Int64[Tensor, " row"], rows: Int[Tensor, " row"]) -> Callable:
    """The pre-hook of one layer: rows read texts[column]."""
    needed = int(rows.max()) + 1

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = kwargs["encoder_hidden_states"]
        if (
            not isinstance(states, Tensor)
            or len(states) < needed
            or (states.shape[1:] != texts.embeds.shape[1:])
        ):
            found = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(
                f"the denoiser was called with text states {found}, but {needed} rows of "
                f"{tuple(texts.embeds.shape[1:])} are routed: check rows=, and that the texts "
                "were encoded for this pipeline"
            )
        read = texts.embeds[column].to(states)
        kwargs["encoder_hidden_states"] = states.index_copy(0, rows, read)
        mask = kwargs.get("attention_mask")
        if mask is not None:  # a bias, [batch, 1, token], large and negative where not to look
            seen = torch.ones(read.shape[:2]) if texts.mask is None else texts.mask[column]
            bias = ((1 - seen.to(mask)) * -10000.0)[:, None]
            kwargs["attention_mask"] = mask.index_copy(0, rows, bias)
        return args, kwargs

    return hook


def _says(texts: TextStates, column: Tensor, rows: Tensor) -> Callable[[], dict[str, Any]]:
    """What the pre-hook of one layer does, in JSON; worked out when somebody asks."""
    return lambda: {
        "texts": says_tensor(texts.embeds), "reads": column.tolist(), "rows": rows.tolist()
    }  # fmt: skip


def windows(layers: int, size: int) -> Bool[Tensor, "window layer"]:
    """Which layers each window of `size` adjacent layers covers: [window, layer] bool.

    windows(16, 2)[6].nonzero().flatten()  # tensor([6, 7])
    """
    if (number := whole_number(size, 1, layers)) is None:
        raise ValueError(
            f"window {size!r} does not fit: this model has {layers} text layers, so "
            f"choose a whole number from 1 to {layers}"
        )
    start, layer = torch.arange(layers - number + 1)[:, None], torch.arange(layers)
    return (layer >= start) & (layer < start + number)


def checked_map(
    src: Int[Tensor, "row layer"] | Sequence[Sequence[int]], layers: int, texts: int
) -> Int64[Tensor, "row layer"]:
    """`src` as [row, layer] long; refuses one that does not fit the model or the texts."""
    src = torch.as_tensor(src)
    if src.ndim != 2 or src.shape[1] != layers or src.is_floating_point() or not len(src):
        raise ValueError(
            f"a source map is [row, layer] of whole numbers with {layers} layers; "
            f"got {src.dtype} {tuple(src.shape)}"
        )
    if src.min() < 0 or src.max() >= texts:
        raise ValueError(
            f"the source map names texts {int(src.min())} to {int(src.max())}, "
            f"but there are texts 0 to {texts - 1}"
        )
    return src.long()
