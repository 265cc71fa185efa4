"""Which weights of a pipeline can be edited, and how one set of them is told from another.

A weight is named from the pipeline down: "unet.mid_block. ... .attn2.to_k.weight".
"""

import hashlib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..families import TextLayer, family_of
from ..families.checks import plain_module, refuse_streamed
from ..families.running import plain
from ..records import model_name

#: What the marks of a fingerprint are rounded to.
MARKS = (torch.float16, torch.bfloat16)


def module_of(pipe: Any, name: str) -> nn.Module:
    """The module that holds the weight `name`. Raises ValueError if the pipeline has none."""
    component, _, path = name.removesuffix(".weight").partition(".")
    try:
        return plain(getattr(pipe, component)).get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"this {model_name(pipe)} has no weight {name}: the edit is for another model"
        ) from None


def bare_module_of(pipe: Any, name: str) -> nn.Module:
    """The same below the adapter that wraps it, if any does."""
    module = module_of(pipe, name)
    return getattr(module, "base_layer", module)


def editable(pipe: Any, name: str) -> nn.Module:
    """The linear or convolution whose weight is `name`.

    Raises ValueError with the reason and the fix if it cannot be edited: fused, wrapped by an
    adapter, quantised or offloaded.
    """
    module_of(pipe, name)
    path, _, last = name.removesuffix(".weight").rpartition(".")
    return plain_module(module_of(pipe, path), last, name)


def editables(pipe: Any, names: Iterable[str]) -> dict[str, nn.Module]:
    """Weight name -> the linear or convolution that holds it, of all weights of an edit.

    Raises ValueError as `editable`, and where another copy of the weights is kept that would soon
    overwrite edited ones.
    """
    found = {name: editable(pipe, name) for name in names}
    for component in dict.fromkeys(name.partition(".")[0] for name in found):
        refuse_streamed(plain(getattr(pipe, component)), component)
    return found


def linear_of(pipe: Any, name: str) -> nn.Linear:
    """The linear module whose weight is `name`. Errors as `editable`, and for a convolution."""
    module = editable(pipe, name)
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"{name} belongs to a {type(module).__name__}: only an nn.Linear reads embeddings"
        )
    return module


def fingerprint(weight: Tensor) -> str:
    """Two marks of a weight, "float16:bfloat16": 16 hex digits each of the SHA-256 of its shape and
    of its values rounded to these dtypes.

    A model loaded in float16, float32 or float64, on any device, has the same first mark; one in
    float32, float64 or bfloat16 the same second one. Compare two by `matches`.
    """
    return ":".join(_mark(weight, dtype) for dtype in MARKS)


def is_of(weight: Tensor, fingerprint: str) -> bool:
    """Whether a fingerprint is of a load of this weight: as `matches`, quicker."""
    marks = zip(MARKS, fingerprint.split(":"), strict=False)
    return any(_mark(weight, dtype) == known for dtype, known in marks)


def matches(fingerprint: str, other: str) -> bool:
    """Whether two fingerprints are of loads of one weight: either mark is enough. Edits of 0.3 have
    the first alone.

    >>> matches("1f:2e", "1f"), matches("1f:2e", "5a:2e"), matches("1f:2e", "2e:1f")
    (True, True, False)
    """
    pairs = zip(fingerprint.split(":"), other.split(":"), strict=False)
    return any(mark == known for mark, known in pairs)


@torch.no_grad()
def _mark(weight: Tensor, dtype: torch.dtype) -> str:
    rounded = weight.detach().to(device="cpu", dtype=dtype).contiguous()
    mark = hashlib.sha256(f"{list(weight.shape)}\n".encode())
    mark.update(rounded.view(torch.int16).numpy())
    return mark.hexdigest()[:16]


def kind_of(name: str) -> str:
    """The kind of a weight: "k", to keys (to_k, add_k_proj), "v", to values, or else "out"."""
    words = name.removesuffix(".weight").rpartition(".")[2].split("_")
    return next((kind for kind in ("k", "v") if kind in words), "out")


def projections(pipe: Any, layers: Sequence[int], where: Sequence[str] = ("k", "v")) -> list[str]:
    """Names of the weights by which `layers` read text: to keys ("k"), to values ("v").

    Raises ValueError for a layer that does not exist and for a choice that matches no weight.

    projections(pipe, [8])  # ["unet.up_blocks. ... .attn2.to_k.weight", "... .to_v.weight"]
    """
    model = family_of(pipe)
    if isinstance(where, str) or not set(where) <= {"k", "v"} or not len(where):
        raise ValueError(f"where={where!r} matches no weight: choose from ('k', 'v')")
    return [
        name
        for layer in chosen_layers(model.text_layers, layers)
        for projection in model.kv(layer)
        if kind_of(name := f"{model.component}.{layer.name}.{projection}.weight") in where
    ]


def chosen_layers(known: Sequence[TextLayer], layers: Sequence[int]) -> list[TextLayer]:
    """The text layers with these indices, in order. Raises ValueError for one that is not there."""
    try:
        indices = sorted({operator.index(layer) for layer in layers})
    except TypeError:
        raise ValueError(
            f"layers must be a list of indices of text layers, not {layers!r}: pass [8, 9], say, "
            "or the .layers of a Localization"
        ) from None
    wrong = [index for index in indices if not 0 <= index < len(known)]
    if wrong or not indices:
        raise ValueError(
            f"layers {wrong if wrong else 'is empty, but'} must be among the text layers 0 to "
            f"{len(known) - 1} of this pipeline: see loco.text_layers(pipe)"
        )
    return [known[index] for index in indices]
