"""Neurons: single outputs of to_k and to_v that tell a concept from its neutral twin.

A neuron is one row of a projection that reads text (arXiv 2405.01008, section on neurons). Over
prompts with the concept (s) and neutral ones (n) its activations have means mu, standard deviations
sd and counts n, and it is ranked by the size of Welch's t:

    z = (mu_s - mu_n) / sqrt(sd_s^2 / n_s + sd_n^2 / n_n)

Neurons of all layers and projections are ranked together. A projection is linear in the encoded
prompt, the same at every step of the denoising, so no image is made: activation = W c.

The first k are then held at their mean neutral activation or at zero, wherever text is read: at
every token, of every row of the batch, as a change of the weights would. That of guidance too: held
in the prompt alone, a neuron would still differ between prompt and empty prompt, and guidance would
magnify the difference. A neuron of to_k that is the same at every token adds the same number to all
scores of a query, which softmax forgets: there both modes do the same.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .. import records
from .._progress import bar
from ..concepts import Concept
from ..families import Family, TextStates, family_of
from ..interventions.patching import rewriting
from ..interventions.sampling import generate
from .cross_attention import projections
from .edit import Edit, make_edit
from .knockout import Knockout
from .reading import kind_of
from .rows import gather, with_targets
from .weights import fingerprint, linear_of

__all__ = ["Neurons", "ablation_curve", "rank_neurons", "welch_z"]

#: What an ablated neuron is held at: its mean over the neutral prompts, or nothing.
MODES = ("neutral_mean", "zero")
#: Where activations are read: the last token of the subject (in the twin, of what stands in its
#: place), the end of the text, the mean over the padding behind it, or the mean over all words and
#: the end of the text.
TOKENS = ("last", "eos", "padding", "all")


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
        with rewriting(held, family_of(pipe).denoiser(pipe)):
            yield pipe

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
        """Write `neurons.json` and `neurons.safetensors`, whole or not at all."""
        header: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                tensors[field.name] = value
            else:
                is_record = dataclasses.is_dataclass(value)
                header[field.name] = asdict(value) if is_record else value
        records.save_record(folder, "neurons", header, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> Neurons:
        """What `save` wrote, equal to what was saved; refuses a damaged folder."""
        header, tensors = records.load_record(folder, "neurons")
        try:
            listed = {n: tuple(header[n]) for n in ("weights", "layers", "sizes", "originals")}
            fields: dict[str, Any] = {**listed, **tensors}
            return cls(
                concept=Concept(**header["concept"]),
                provenance=records.Provenance(**header["provenance"]),
                **fields,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the neurons in {folder} are damaged ({error!r}): rank them again"
            ) from None

    def _rows(self, top: int) -> dict[str, Tensor]:
        """Weight name -> sorted rows among the `top` first neurons, if there are any."""
        if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= len(self):
            raise ValueError(f"top={top!r}: choose a whole number from 0 to {len(self)} neurons")
        first = torch.zeros(len(self), dtype=torch.bool)
        first[self.order[:top]] = True
        chosen = [part.nonzero().flatten() for part in first.split(self.sizes)]
        return {name: row for name, row in zip(self.weights, chosen, strict=True) if len(row)}

    def _modules(self, pipe: Any) -> dict[str, Any]:
        """The projections in `pipe`; refuses a pipeline with other weights."""
        modules = {name: linear_of(pipe, name) for name in self.weights}
        for name, mark in zip(self.weights, self.originals, strict=True):
            if fingerprint(modules[name].weight) != mark:
                raise ValueError(
                    f"{self!r} belong to other weights than those of this "
                    f"{records.model_name(pipe)} ({name} differs): load {self.provenance.model}, "
                    "revert edits of it, or rank its neurons again"
                )
        return modules


@torch.no_grad()
def rank_neurons(
    pipe: Any,
    concept: Concept,
    layers: Sequence[int],
    where: Sequence[str] = ("to_k", "to_v"),
    token: str = "padding",
    *,
    by: str = "z",
    neutral: Sequence[str] | None = None,
) -> Neurons:
    """The outputs of to_k and to_v of `layers`, ranked by how well they tell `concept`.

    By |z|, see above, of activations on concept.prompts against those on their neutral twins; ties
    by index. Computed in float64 on the CPU from the encoded prompts; no image is made. z says how
    surely a neuron differs, not how far: by="shift" ranks by |mu_s - mu_n| instead.

    layers: indices of text layers in execution order, such as `found.layers` of a Localization.
    where: "to_k", "to_v" or both. token: where the activations are read, one number per prompt:
    "last", the last token of the subject (the paper; in a twin, of what stands in its place);
    "eos", the end of the text; "padding", the mean over the padding behind it, which a causal text
    encoder has let read everything and which is most of what a layer reads of a short prompt;
    "all", the mean over the words and the end of the text. The neutral mean is of the same tokens.
    neutral: other prompts to compare with, one for each, such as `concept.renamed(artists)`.
    On mini-sd "padding", to_v alone and by="shift" need the fewest neurons by far; with "last" and
    both projections (the paper) as many do nothing.
    Raises ValueError for a layer, projection, token or order that does not exist, fewer than two
    prompts, a concept that is cut off, and for "padding" a prompt that leaves none.

        neurons = loco.rank_neurons(pipe, loco.shapeland.concept("style", "Mira Holt", 12), [8, 9])
        neurons.to_frame().head()
        with neurons.ablated(pipe, top=50):
            images = loco.generate(pipe, concept.prompts)
    """
    family = family_of(pipe)
    if not isinstance(concept, Concept):
        raise TypeError(f"concept must be a loco.Concept, not {concept!r}: see loco.concepts")
    if isinstance(where, str) or not len(where) or not set(where) <= {"to_k", "to_v"}:
        raise ValueError(f"where={where!r} matches no projection: choose from ('to_k', 'to_v')")
    if token not in TOKENS:
        raise ValueError(f"unknown token {token!r}: choose one of {', '.join(TOKENS)}")
    if by not in ("z", "shift"):
        raise ValueError(f'by={by!r}: choose "z" or "shift"')
    if len(concept.prompts) < 2:
        raise ValueError(
            f"concept {concept.name!r} has 1 prompt, of which there is no variance: give at least 2"
        )
    names = projections(pipe, layers, [kind_of(name) for name in where])
    index = {layer.name: layer.index for layer in family.text_layers(pipe)}
    modules = [linear_of(pipe, name) for name in names]
    pair = with_targets(concept, "neutral" if neutral is None else neutral)
    c, c_neutral = _read(pipe, family, pair, token)
    activations = [_activations(modules, states) for states in (c, c_neutral)]
    z, (mean, neutral_mean) = welch_z(*activations), (x.mean(0) for x in activations)
    size = z.abs() if by == "z" else (mean - neutral_mean).abs()
    return Neurons(
        concept=concept,
        weights=tuple(names),
        layers=tuple(index[name.split(".", 1)[1].rsplit(".", 2)[0]] for name in names),
        sizes=tuple(module.out_features for module in modules),
        originals=tuple(fingerprint(module.weight) for module in modules),
        z=z,
        concept_mean=mean,
        neutral_mean=neutral_mean,
        order=(-size).argsort(stable=True),
        provenance=records.provenance(
            pipe,
            layers=sorted({operator.index(layer) for layer in layers}),
            where=sorted(where),
            token=token,
            by=by,
            neutral=pair.target,
        ),
    )


def welch_z(
    s: Float[Tensor, "prompt neuron"], n: Float[Tensor, "twin neuron"]
) -> Float64[Tensor, " neuron"]:
    """z of each neuron, [neuron] float64, of activations s, n: [prompt, neuron], two or more each.

    (mu_s - mu_n) / sqrt(sd_s^2 / n_s + sd_n^2 / n_n), with unbiased variances. The denominator is
    at least 1e-12 (|mu_s| + |mu_n|), below which it is rounding: a neuron that never varies scores
    0 if the means are equal, and otherwise a finite 1e12 at most, ahead of all that vary.

        welch_z(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]]))  # tensor([0.7071])
    """
    s, n = s.double(), n.double()
    difference = s.mean(0) - n.mean(0)
    error = (s.var(0) / len(s) + n.var(0) / len(n)).sqrt()
    error = error.maximum(1e-12 * (s.mean(0).abs() + n.mean(0).abs()))
    return torch.where(difference == 0, 0.0, difference / error)


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


def _read(pipe: Any, family: Family, pair: Concept, token: str) -> tuple[Tensor, Tensor]:
    """What the projections read of the prompts and of their targets: [prompt, width] each."""
    for prompt in pair.prompts:
        family.subject_span(pipe, prompt, pair.name)  # refuses a concept that is cut off

    def encode(prompts: Sequence[str]) -> TextStates:
        return family.encode(pipe, list(prompts))

    if token == "last":
        rows = gather(pipe, family, encode, [pair], "last")
        return rows.keys, rows.targets
    tokenizer, target = family.tokenizer(pipe), pair.target or ()
    return (
        _pooled(tokenizer, pair.prompts, encode(pair.prompts), token),
        _pooled(tokenizer, target, encode(target), token),
    )


def _pooled(
    tokenizer: Any, prompts: Sequence[str], states: TextStates, token: str
) -> Float64[Tensor, "prompt width"]:
    """One text state per prompt, [prompt, width] float64: the mean over the tokens of `token`."""
    first = int(states.tokens[0, 0] == tokenizer.bos_token_id)
    means = []
    for prompt, tokens, embeds in zip(prompts, states.tokens, states.embeds, strict=True):
        end = first + int((tokens[first:] == tokenizer.eos_token_id).nonzero()[0])
        span = {"eos": slice(end, end + 1), "padding": slice(end + 1, None)}
        chosen = embeds[span.get(token, slice(first, end + 1))]
        if not len(chosen):
            raise ValueError(
                f'prompt {prompt!r} fills all {len(tokens)} tokens: with token="padding" a prompt '
                'must leave some, so shorten it or use token="eos"'
            )
        means.append(chosen.cpu().double().mean(0))
    return torch.stack(means)


def _activations(modules: Sequence[Any], states: Tensor) -> Tensor:
    """Outputs of all modules side by side, [prompt, neuron] float64 on the CPU."""
    outputs = []
    for module in modules:
        weight, bias = module.weight.cpu().double(), module.bias
        outputs.append(states.cpu().double() @ weight.T)
        if bias is not None:
            outputs[-1] += bias.cpu().double()
    return torch.cat(outputs, dim=1)


def _holds(row: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
    """A rewrite that sets the features `row` of an output [..., feature] to `values`."""

    def rewrite(x: Tensor) -> Tensor:
        return x.index_copy(-1, row.to(x.device), values.to(x).expand(*x.shape[:-1], -1))

    return rewrite
