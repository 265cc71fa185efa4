"""Neurons: single outputs of to_k and to_v, held at one value.

A neuron is one row of a projection that reads text (arXiv 2405.01008, section on neurons);
`neuron_ranking` says which of them tell a concept. The first k are held at their mean neutral
activation or at zero, wherever text is read: at every token, of every row of the batch, as a change
of the weights would. That of guidance too: held in the prompt alone, a neuron would still differ
between prompt and empty prompt, and guidance would magnify the difference. A neuron of to_k that is
the same at every token adds the same number to all scores of a query, which softmax forgets: there
both modes do the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import records
from .._progress import bar
from ..concepts import Concept
from ..edits.edit import Edit, make_edit
from ..edits.knockout import Knockout
from ..edits.weights import fingerprint, linear_of, matches
from ..families import family_of
from ..interventions.active import closed, opened, says_tensor
from ..interventions.patching import rewriting
from ..painting.generate import generate
from .ranking import Ranking

__all__ = ["Neurons", "ablation_curve"]

#: What an ablated neuron is held at: its mean over the neutral prompts, or nothing.
MODES = ("neutral_mean", "zero")


@dataclass(frozen=True, eq=False)
class Neurons:
    """The neurons of some projections, ranked for a concept by `rank_neurons`.

    weights: names of the weights, from the pipeline down. layers, sizes, originals: of each, its
    text layer, number of neurons and fingerprint. z, concept_mean, neutral_mean: [neuron] float64
    on the CPU, in the order of `weights`. order: [neuron] int64, the highest rank first.
    """

    concept: Concept
    weights: tuple[str, ...]
    layers: tuple[int, ...]
    sizes: tuple[int, ...]
    originals: tuple[str, ...]
    z: Tensor
    concept_mean: Tensor
    neutral_mean: Tensor
    order: Tensor
    provenance: records.Provenance

    def __len__(self) -> int:
        """How many neurons were ranked."""
        return len(self.z)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Neurons) and records.same(self, other)

    def __repr__(self) -> str:
        return (
            f"<Neurons: {len(self)} of layers {sorted(set(self.layers))} of "
            f"{self.provenance.model}, ranked for {self.concept.name}>"
        )

    def shuffled(self, seed: int = 0) -> Neurons:
        """The same neurons in random order: a control for the ranking.

        with neurons.shuffled(seed=1).ablated(pipe, top=50): ...
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        settings = {**self.provenance.settings, "shuffled": seed}
        made_by = dataclasses.replace(self.provenance, settings=settings)
        return dataclasses.replace(self, order=order, provenance=made_by)

    @contextmanager
    def ablated(self, pipe: Any, top: int, mode: str = "neutral_mean") -> Iterator[Any]:
        """The pipeline with the `top` first neurons held at one value, for a `with` block.

        mode: "neutral_mean" or "zero". By forward hooks, which are gone on exit, also on an
        exception; no weight is touched. top=0 changes nothing.
        Raises ValueError for a mode or number that does not exist, for other weights than those
        that were ranked and for a compiled denoiser, and RuntimeError on exit if a projection did
        not run.

            with loco.rank_neurons(pipe, concept, [8, 9]).ablated(pipe, top=50):
                images = loco.generate(pipe, concept.prompts)
        """
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: choose from {MODES}")
        rows = self._rows(top)
        modules = self._modules(pipe)
        means = dict(zip(self.weights, self.neutral_mean.split(self.sizes), strict=True))
        held = {
            modules[name]: _holds(row, means[name][row] * (mode == "neutral_mean"))
            for name, row in rows.items()
        }
        again = _Ablated(self, int(top), mode)
        with rewriting(held, family_of(pipe).denoiser, says=again.says):
            opened(pipe, again)
            try:
                yield pipe
            finally:
                closed(pipe, again)

    def edit(self, pipe: Any, top: int, mode: str = "zero") -> Edit:
        """The same as an Edit that can be applied, saved and composed: `top` rows set to zero.

        Only with mode="zero": to hold a neuron at another value than zero takes a bias, and these
        projections have none. Raises ValueError for that and as `ablated`; top is at least 1.

            loco.rank_neurons(pipe, concept, [8, 9]).edit(pipe, top=50).save("edit.safetensors")
        """
        if mode != "zero":
            raise ValueError(
                f'mode={mode!r} is no change of weights: use mode="zero", or '
                f"`with neurons.ablated(pipe, {top!r}, {mode!r}):`"
            )
        rows = self._rows(top)
        if not rows:
            raise ValueError("top=0 changes nothing: an edit takes at least 1 neuron")
        modules, changes = self._modules(pipe), {}
        for name, row in rows.items():
            if modules[name].bias is not None:
                raise ValueError(
                    f"{name} has a bias, which stays when its rows are zero: use "
                    f'`with neurons.ablated(pipe, {top!r}, "zero"):`'
                )
            width = modules[name].in_features
            entries = row[:, None] * width + torch.arange(width)
            changes[name] = Knockout(tuple(modules[name].weight.shape), entries.flatten())
        return make_edit(
            pipe,
            changes,
            method="neurons",
            concepts=[asdict(self.concept)],
            top=int(top),
            ranked=self.provenance.settings,
        )

    def to_frame(self) -> Any:
        """A pandas table, a row per neuron, the highest rank first: layer, projection, neuron (row
        of the weight), z and the mean activation with the concept and without."""
        import pandas

        parts = zip(self.layers, self.weights, self.sizes, strict=True)
        rows = [(n, name.split(".")[-2], i) for n, name, size in parts for i in range(size)]
        frame = pandas.DataFrame(rows, columns=["layer", "projection", "neuron"]).assign(
            z=self.z.tolist(),
            concept=self.concept_mean.tolist(),
            neutral=self.neutral_mean.tolist(),
        )
        return frame.iloc[self.order.tolist()].reset_index(drop=True)

    def save(self, folder: str | Path) -> None:
        """Write `neurons.safetensors`, whole or not at all."""
        records.save(self, folder, "neurons")

    @classmethod
    def load(cls, folder: str | Path) -> Neurons:
        """What `save` wrote, equal to what was saved; refuses a damaged file."""
        return records.load(cls, folder, "neurons", older=_of_two_files)

    def _rows(self, top: int) -> dict[str, Tensor]:
        """Weight name -> sorted rows among the `top` first neurons, if there are any."""
        if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= len(self):
            raise ValueError(f"top={top!r}: choose a whole number from 0 to {len(self)} neurons")
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(self))
        scores = (-place).split(self.sizes)
        ranking = Ranking(lambda: zip(self.weights, scores, strict=True))
        return ranking.top({"": torch.tensor([top])})

    def _modules(self, pipe: Any) -> dict[str, Any]:
        """The projections in `pipe`; refuses a pipeline with other weights."""
        modules = {name: linear_of(pipe, name) for name in self.weights}
        for name, mark in zip(self.weights, self.originals, strict=True):
            if not matches(fingerprint(modules[name].weight), mark):
                raise ValueError(
                    f"{self!r} belong to other weights than those of this "
                    f"{records.model_name(pipe)} ({name} differs): load {self.provenance.model}, "
                    "revert edits of it, or rank its neurons again"
                )
        return modules


def _of_two_files(header: dict[str, Any], tensors: dict[str, Tensor]) -> Neurons:
    """From a record of 0.3."""
    listed = {n: tuple(header[n]) for n in ("weights", "layers", "sizes", "originals")}
    fields: dict[str, Any] = {**listed, **tensors}
    concept, made = Concept(**header["concept"]), records.Provenance(**header["provenance"])
    return Neurons(concept=concept, provenance=made, **fields)


@dataclass(frozen=True)
class _Ablated:
    """`Neurons.ablated`, to be entered again on another pipeline."""

    neurons: Neurons
    top: int
    mode: str

    def __call__(self, pipe: Any) -> Any:
        return self.neurons.ablated(pipe, self.top, self.mode)

    def says(self) -> dict[str, Any]:
        """What is held at what, in JSON."""
        rows = {name: row.tolist() for name, row in self.neurons._rows(self.top).items()}
        held = says_tensor(self.neurons.neutral_mean) if self.mode == "neutral_mean" else 0
        return {"ablated": rows, "at": held}


def ablation_curve(
    pipe: Any,
    neurons: Neurons,
    prompts: Sequence[str],
    tops: Sequence[int],
    *,
    mode: str = "neutral_mean",
    **sampling: Any,
) -> Float[Tensor, "top prompt seed 3 height width"]:
    """Images [top, prompt, seed, 3, H, W] in [0, 1] with the first 0, 1, ... of `neurons` ablated.

    tops: how many each time. mode: see `Neurons.ablated`. sampling: seeds, steps, guidance, ... of
    `loco.generate`. Every number paints the same prompts from the same noise. Errors as theirs.

        images = ablation_curve(pipe, neurons, ["a star in the style of Mira Holt"], [0, 10, 50])
    """
    if not len(tops):
        raise ValueError("tops is empty: give at least one number of neurons, such as [0, 10, 50]")
    for top in tops:
        neurons._rows(top)  # refuses one that does not exist before anything is painted
    images = []
    with bar(len(tops), "ablating neurons", "curve point") as progress:
        for top in tops:
            with neurons.ablated(pipe, top, mode):
                images.append(generate(pipe, prompts, **sampling))
            progress.update()
    return torch.stack(images)


def _holds(row: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
    """A rewrite that sets the features `row` of an output [..., feature] to `values`."""

    def rewrite(x: Tensor) -> Tensor:
        return x.index_copy(-1, row.to(x.device), values.to(x).expand(*x.shape[:-1], -1))

    return rewrite
