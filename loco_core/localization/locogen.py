"""LocoGen: which text layers carry a concept (arXiv 2405.01008, algorithm 1).

    for j in 0..M-m:   layers C_j .. C_{j+m-1} read c', all others c, at every step
        a_j = mean over prompts and seeds of CLIPScore(image_j, original prompt)
    layers of the concept: argmin_j a_j; for a fact argmax_j CLIPScore(image_j, updated fact)

c is the prompt with the concept and c' its neutral twin (or, by choice, the bare target; for a
fact always the updated one). Only the conditional half of classifier-free guidance is touched.

SD-XL hands its denoiser a pooled embedding of the prompt too, beside all text layers. By default it
stays that of c, so that what a window does is what its layers do; then even the row in which every
layer reads c' may still show some of the concept. With pooled="swap" a row whose window reads c'
gets the pooled embedding of c' as well.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import records
from ..concepts import Concept
from ..families import Model, family_of
from ..interventions.routing import windows
from ..judging.clip_score import clip_for, clip_score
from ..painting.paint import checked_seeds, generate
from ..statistics import t_interval, units

Score = Callable[[Tensor, list[str]], Tensor]


@dataclass(frozen=True, eq=False)
class Scored:
    """images: [..., prompt, seed, 3, H, W] float32 in [0, 1], on the 8-bit grid that PNG files
    have. scores: [..., prompt, seed] float64."""

    images: Tensor
    scores: Tensor


@dataclass(frozen=True, eq=False)
class Localization:
    """What a sweep found. Everything lives on the CPU.

    swept: per window. baseline: nothing replaced. neutral: every layer reads the neutral text.
    window: layers in a window. tried: (window size, best mean score) of each size that was swept.
    """

    concept: Concept
    window: int
    layer_names: tuple[str, ...]
    swept: Scored
    baseline: Scored
    neutral: Scored
    tried: tuple[tuple[int, float], ...]
    provenance: records.Provenance

    @property
    def images(self) -> Tensor:
        """[window, prompt, seed, 3, H, W] float32 in [0, 1]."""
        return self.swept.images

    @property
    def samples(self) -> Tensor:
        """Scores [window, prompt, seed] float64."""
        return self.swept.scores

    @property
    def scores(self) -> Tensor:
        """Mean score of each window: [window] float64."""
        return self.samples.flatten(1).mean(1)

    @property
    def interval(self) -> Tensor:
        """95 % interval (Student's t) of each mean over prompts, of a single prompt over its seeds:
        [window, 2] float64 (low, high); NaN for a single picture."""
        return t_interval(units(self.samples))

    @property
    def layers(self) -> tuple[int, ...]:
        """The located layers: the window with the lowest mean score, for a fact the highest."""
        best = int(_best(self.scores, self.concept.kind))
        return tuple(range(best, best + self.window))

    def to_frame(self) -> Any:
        """A pandas table, a row per window: layers, module of the first, score, low, high."""
        import pandas

        starts = range(len(self.samples))
        return pandas.DataFrame(
            {
                "window": list(starts),
                "layers": ["-".join(map(str, sorted({j, j + self.window - 1}))) for j in starts],
                "first module": [self.layer_names[j] for j in starts],
                "score": self.scores.tolist(),
                "low": self.interval[:, 0].tolist(),
                "high": self.interval[:, 1].tolist(),
                "found": [j == self.layers[0] for j in starts],
            }
        )

    def save(self, folder: str | Path) -> None:
        """Write `localization.json` and `localization.safetensors`, whole or not at all."""
        header, tensors = {}, {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Scored):
                tensors[f"{field.name}.images"] = (value.images * 255).round().to(torch.uint8)
                tensors[f"{field.name}.scores"] = value.scores
            else:
                is_record = dataclasses.is_dataclass(value)
                header[field.name] = dataclasses.asdict(value) if is_record else value
        records.save_record(folder, "localization", header, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> "Localization":
        """What `save` wrote, equal to what was saved; refuses a damaged folder."""
        header, tensors = records.load_record(folder, "localization")
        try:
            scored = {
                name: Scored(tensors[f"{name}.images"].float() / 255, tensors[f"{name}.scores"])
                for name in ("swept", "baseline", "neutral")
            }
            return cls(
                concept=Concept(**header["concept"]),
                window=header["window"],
                layer_names=tuple(header["layer_names"]),
                tried=tuple((size, best) for size, best in header["tried"]),
                provenance=records.Provenance(**header["provenance"]),
                **scored,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the localization in {folder} is damaged ({error!r}): make it again"
            ) from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Localization) and records.same(self, other)


@torch.no_grad()
def localize(
    pipe: Any,
    concept: Concept,
    window: int | str = 2,
    seeds: Iterable[int] = range(4),
    *,
    neutral: str | None = None,
    pooled: str = "keep",
    steps: int = 25,
    guidance: float = 7.5,
    batch_size: int = 16,
    score: Score | None = None,
    threshold: float | None = None,
    folder: str | Path | None = None,
) -> Localization:
    """Sweep windows of adjacent text layers over `concept` and find where it enters.

    window: layers that read the neutral text together, or "smallest": 1, 2, ... until the concept
    is removed, that is until the best window's mean score reaches the 95 % interval of the fully
    neutral images (or `threshold`). neutral: "twin" (concept.neutral) or "target"
    (concept.target); by default the twin, and for a fact the target. pooled: "keep" or "swap", for
    a family with a pooled embedding (SD-XL), see above. score: (images [n, 3, H, W] in [0, 1],
    texts) -> [n]; by default CLIP-Score with the CLIP of a mini. folder: finished batches are kept
    there, and a killed sweep goes on from them with the same result.
    Raises ValueError on a window larger than the model, a concept cut off by the tokenizer, a
    seed given twice, "swap" for a family without a pooled embedding and what `generate` refuses.

        found = loco.localize(pipe, loco.shapeland.concept("style", name), window=2)
        found.layers, found.to_frame()
    """
    model, seeds = family_of(pipe), checked_seeds(seeds)
    names = tuple(layer.name for layer in model.text_layers)
    if isinstance(window, str) and window != "smallest":
        raise ValueError(f'window {window!r}: pass a number of layers or "smallest"')
    sizes: Any = range(1, len(names) + 1) if window == "smallest" else [window]
    masks = [windows(len(names), size) for size in sizes]
    _check_pooled(model, pooled)
    for prompt in concept.prompts:
        model.subject_span(prompt, concept.name)
    sources = [*concept.prompts, *_replacement(concept, neutral)]
    judged = list((concept.target or ()) if concept.kind == "fact" else concept.prompts)
    score = partial(clip_score, clip=clip_for(pipe)) if score is None else score

    def run(routes: Tensor, part: str) -> Scored:
        """Images and scores of source maps, [row, prompt, layer]: rows sampled in one batch."""
        made = generate(
            pipe, list(concept.prompts) * len(routes), seeds, steps, guidance,
            routes=routes.flatten(0, 1), sources=sources, batch_size=batch_size,
            pooled_routes=routes.amax(2).flatten() if pooled == "swap" else None,
            folder=None if folder is None else Path(folder) / part,
        )  # fmt: skip
        images = made.mul(255).round().div(255).unflatten(0, (len(routes), len(judged)))
        return Scored(images, scores_of(score, images, judged))

    original = torch.arange(len(judged))[:, None].expand(-1, len(names))
    replaced = original + len(judged)
    tried, ends = [], [original, replaced]
    for size, mask in zip(sizes, masks, strict=True):
        routes = torch.where(mask[:, None], replaced, original)
        made = run(torch.stack([*ends, *routes]), f"window-{size}")
        if ends:
            baseline, floor = (Scored(made.images[i], made.scores[i]) for i in (0, 1))
        swept = Scored(made.images[len(ends) :], made.scores[len(ends) :])
        ends = []
        means = swept.scores.flatten(1).mean(1)
        tried.append((size, float(means[_best(means, concept.kind)])))
        if window != "smallest" or _removed(tried[-1][1], floor, concept.kind, threshold):
            break
    else:
        raise ValueError(
            f"no window brings the score of {concept.name!r} to {threshold} (size, best score: "
            f"{tried}): leave threshold=None to compare with the neutral images"
        )
    made_by = records.provenance(
        pipe, seeds=seeds, steps=steps, guidance=guidance, batch_size=batch_size,
        asked_window=window, neutral=sources[len(judged) :], judged=judged, threshold=threshold,
        pooled=pooled if model.pooled else None,
        scheduler=type(pipe.scheduler).__name__, dtype=str(model.denoiser.dtype),
    )  # fmt: skip
    return Localization(concept, size, names, swept, baseline, floor, tuple(tried), made_by)


def _best(means: Tensor, kind: str) -> Tensor:
    return means.argmax() if kind == "fact" else means.argmin()


def _removed(best: float, neutral: Scored, kind: str, threshold: float | None) -> bool:
    """Whether the best window does what replacing the text everywhere does."""
    floor = units(neutral.scores)
    low, high = t_interval(floor).tolist() if len(floor) > 1 else floor.tolist() * 2
    if kind == "fact":
        return best >= (low if threshold is None else threshold)
    return best <= (high if threshold is None else threshold)


def _check_pooled(model: Model, pooled: str) -> None:
    if pooled not in ("keep", "swap"):
        raise ValueError(f'pooled={pooled!r}: choose "keep" or "swap"')
    if pooled == "swap" and not model.pooled:
        raise ValueError(
            f'pooled="swap": {model.name} has no pooled text to swap, its prompts enter only '
            'through the text layers; leave pooled="keep"'
        )


def _replacement(concept: Concept, neutral: str | None) -> Sequence[str]:
    """The prompts that windows read instead of the concept's."""
    if neutral is None:
        neutral = "target" if concept.kind == "fact" else "twin"
    if neutral not in ("twin", "target"):
        raise ValueError(f'neutral={neutral!r}: choose "twin" or "target"')
    if neutral == "twin":
        return concept.neutral
    if concept.target is None:
        raise ValueError(
            f"concept {concept.name!r} has no target prompts: make it with target=[...], or use "
            'neutral="twin"'
        )
    return concept.target


def scores_of(score: Score, images: Tensor, texts: list[str]) -> Tensor:
    """[row, prompt, seed] float64 of images [row, prompt, seed, 3, H, W], each by its text."""
    rows, _, seeds = images.shape[:3]
    each = [text for text in texts for _ in range(seeds)] * rows
    found = torch.as_tensor(score(images.flatten(0, 2), each)).double().cpu()
    if found.shape != (len(each),) or not bool(found.isfinite().all()):
        raise ValueError(
            f"score must return {len(each)} finite numbers, one per image; got "
            f"{tuple(found.shape)}, finite: {bool(found.isfinite().all())}"
        )
    return found.unflatten(0, images.shape[:3])
