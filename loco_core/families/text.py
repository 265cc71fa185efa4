"""Where text enters a denoiser, and the encoded prompts that enter there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

__all__ = ["TextLayer", "TextStates", "checked_prompts"]


@dataclass(frozen=True)
class TextLayer:
    """One place where text enters the denoiser.

    index: position in execution order, 0-based. name: path of the attention module below the
    denoiser. width: features of the text states that its K and V projections read.
    """

    index: int
    name: str
    width: int


@dataclass(frozen=True, eq=False)
class TextStates:
    """Encoded prompts. embeds: [prompt, token, width], device and dtype of the pipeline.

    tokens: ids, [prompt, token], on the CPU. mask: [prompt, token], nonzero where a token may be
    read, or None if every token is. pooled: [prompt, width] or None.
    """

    embeds: Float[Tensor, "prompt token width"]
    tokens: Int[Tensor, "prompt token"]
    mask: Shaped[Tensor, "prompt token"] | None = None
    pooled: Float[Tensor, "prompt pooled"] | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: Any) -> "TextStates":
        """Rows of the table: a slice, a list of indices or a long tensor."""
        pick: list[Any] = [None if x is None else x[rows] for x in self._fields()]
        return TextStates(*pick)

    @classmethod
    def joined(cls, parts: Sequence["TextStates"]) -> "TextStates":
        """The rows of all parts, in order. Raises ValueError for no part, and for parts that do
        not fit together: with a mask and without, say.

        TextStates.joined([model.encode(["a star"]), model.encode(["a cat"])])
        """
        if not parts:
            raise ValueError("no text states to join: encode at least one prompt")
        columns: list[Any] = []
        for name, column in zip(
            cls.__dataclass_fields__, zip(*(part._fields() for part in parts), strict=True),
            strict=True,
        ):  # fmt: skip
            given = [x for x in column if x is not None]
            if given and len(given) < len(parts):
                raise ValueError(f"some of the text states have no {name}: encode all of one model")
            columns.append(torch.cat(given) if given else None)
        return cls(*columns)

    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.embeds, self.tokens, self.mask, self.pooled


def checked_prompts(prompts: Sequence[str]) -> list[str]:
    """`prompts` as a list; refuses a bare string, an empty list and anything that is no string."""
    if isinstance(prompts, str):
        raise ValueError(
            f"prompts must be a list of strings, got the string {prompts!r}: pass [{prompts!r}]"
        )
    prompts = list(prompts)
    if not prompts:
        raise ValueError("the list of prompts is empty: pass at least one prompt")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {prompt!r} is not a string")
    return prompts
