"""What pictures read: prompts, encoded once, and prompts with noise on their words.

A reading is a prompt, the noise on its words and the sites of the text encoders that have the
activations of the prompt without noise. Text states of plain prompts are encoded at the start, some
at a time; those with noise when a batch needs them, and kept while the next batches do.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Model, Site, TextStates
from ..interventions.patching import Rewrite, added, copies, rewriting
from .picture import Noise, Picture, Sampling

__all__ = ["Reader", "Reading", "alike", "readings_of"]

AT_ONCE = 64  # plain prompts in one call of the text encoders
NOISY = 15  # noised prompts in one call, beside their clean one

Reading = tuple[str, Noise | None, tuple[str, ...]]  # prompt, noise, restored text sites


def plain(prompt: str) -> Reading:
    """The reading of a prompt as it is."""
    return prompt, None, ()


def own(picture: Picture) -> Reading:
    """What a picture reads where nothing else is said."""
    sites = tuple(label for label in picture.restored if Site.of(label).token is not None)
    return picture.prompt, picture.noise, sites


def readings_of(picture: Picture) -> list[Reading]:
    """All readings of a picture, its own first."""
    others = [plain(prompt) for _, prompt in picture.reads]
    return [own(picture), *others, *([] if picture.pooled is None else [plain(picture.pooled)])]


@dataclass(eq=False)
class Reader:
    """Encodes what pictures read. states: the plain prompts; rows: their places there."""

    model: Model
    states: TextStates
    rows: dict[Reading, int]
    negative: TextStates
    noisy: dict[Reading, TextStates] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, pictures: Iterable[Picture], sampling: Sampling) -> "Reader":
        """A reader of all plain prompts of `pictures` and of the negative prompt."""
        pictures = list(pictures)
        reads = [own(p) for p in pictures] + [r for p in pictures for r in readings_of(p)[1:]]
        negative = "" if sampling.negative is None else sampling.negative
        prompts = list(dict.fromkeys([p for p, noise, _ in reads if noise is None] + [negative]))
        chunks = [prompts[i : i + AT_ONCE] for i in range(0, len(prompts), AT_ONCE)]
        states = TextStates.joined([model.encode(chunk) for chunk in chunks])
        rows = {plain(prompt): row for row, prompt in enumerate(prompts)}
        at = rows[plain(negative)]
        pushed = states[at : at + 1]
        if sampling.negative is None:
            pushed = model.unprompted(pushed)
        return cls(model, states, rows, pushed)

    def table(self, readings: Sequence[Reading]) -> TextStates:
        """Text states of these readings, a row each, in their order."""
        wanted = dict.fromkeys(r for r in readings if r not in self.rows)
        self.noisy = {r: states for r, states in self.noisy.items() if r in wanted}
        self._encode([r for r in wanted if r not in self.noisy])
        known = [r for r in readings if r in self.rows]
        parts = [self.states[[self.rows[r] for r in known]]] if known else []
        parts += [self.noisy[r] for r in wanted]
        place = {r: row for row, r in enumerate([*known, *wanted])}
        return TextStates.joined(parts)[[place[r] for r in readings]]

    @torch.no_grad()
    def _encode(self, readings: Sequence[Reading]) -> None:
        """Encode noised readings, each beside the clean run of its prompt."""
        for prompt in dict.fromkeys(prompt for prompt, _, _ in readings):
            own = [r for r in readings if r[0] == prompt]
            for i in range(0, len(own), NOISY):
                part = own[i : i + NOISY]
                with rewriting(_noised(self.model, part) | _restored(self.model, part)):
                    states = self.model.encode([prompt] * (1 + len(part)))
                self.noisy |= {r: states[b : b + 1] for b, r in enumerate(part, 1)}


def _noised(model: Model, readings: Sequence[Reading]) -> dict[nn.Module, Rewrite]:
    """Rewrites of the word embeddings: row b of a batch has the noise of reading b - 1."""
    tables = list(model.embeddings.values())
    rows: dict[nn.Module, dict[int, tuple[int, Tensor]]] = {table: {} for table in tables}
    for b, (_, noise, _) in enumerate(readings, 1):
        if noise is not None:
            for table, drawn in zip(tables, _drawn(noise, tables), strict=True):
                rows[table][b] = noise.first, drawn
    return {table: added(each, 1 + len(readings)) for table, each in rows.items() if each}


def _drawn(noise: Noise, tables: Sequence[nn.Embedding]) -> list[Tensor]:
    """The noise of each text encoder, [token, width]: one generator draws for all in turn."""
    generator = torch.Generator().manual_seed(noise.seed)
    tokens = noise.last - noise.first + 1
    for _ in range(noise.draw + 1):
        drawn = [
            std * torch.randn((tokens, table.embedding_dim), generator=generator)
            for table, std in zip(tables, noise.stds, strict=True)
        ]
    return drawn


def _restored(model: Model, readings: Sequence[Reading]) -> dict[nn.Module, Rewrite]:
    """Rewrites by which row b has activations of row 0, the clean run, at its sites."""
    places = {}
    for b, (_, noise, labels) in enumerate(readings, 1):
        sites = [Site.of(label) for label in labels]
        if sites:
            last = 0 if noise is None else noise.last
            places[b] = [(0, model.module_of(s), last + (s.token or 0)) for s in sites]
    return copies(places)


@torch.no_grad()
def alike(model: Model, pictures: Iterable[Picture], sampling: Sampling) -> dict[Picture, Picture]:
    """Every picture -> the first one whose text states are the same, bit for bit, all else alike.

    Noise does not reach the tokens before it in a causal encoder: to restore them changes nothing,
    and the picture of the corrupted prompt serves them all.
    """
    pictures = list(dict.fromkeys(pictures))
    reader = Reader.of(model, pictures, sampling)
    readings = list(dict.fromkeys(own(p) for p in pictures))
    seals: dict[Reading, bytes] = {}
    for prompt in dict.fromkeys(prompt for prompt, _, _ in readings):
        part = [r for r in readings if r[0] == prompt]
        for i in range(0, len(part), NOISY):
            states = reader.table(part[i : i + NOISY])
            seals |= {r: _bytes(states, row) for row, r in enumerate(part[i : i + NOISY])}
    first: dict[Any, Picture] = {}
    return {p: first.setdefault((seals[own(p)], p.clean), p) for p in pictures}


def _bytes(states: TextStates, row: int) -> bytes:
    tensors = [x[row].cpu().contiguous() for x in (states.embeds, states.pooled) if x is not None]
    return b"".join(bytes(x.view(torch.uint8).numpy()) for x in tensors)
