"""Efficacy, generality and specificity of an edit, against doing nothing and against doing it
elsewhere.

Every edit paints the same prompts from the same noise (`probes` says which, and what is asked), and
so does the unedited model: what it does not show, no edit can take credit for. A judge answers
where there is one, elsewhere CLIP-Score. `intervals` has the 95 % intervals, all over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import records
from .._progress import bar
from ..concepts import Concept
from ..edits.edit import Edit
from ..families import family_of
from ..judging.clip_score import Clip, clip_for
from ..judging.judge import Judge, judge_of
from ..judging.probes import Probe, probes_of
from ..judging.score import Score, by_clip, scores_of
from ..painting.paint import Map, paint
from ..painting.picture import Picture, Sampling, checked_seeds
from ..painting.store import Store
from ..worlds import world_of
from .compare import compared, known_prompts
from .evaluation import Evaluation

__all__ = ["Evaluation", "Probe", "evaluate", "probes_of"]

AT_ONCE = 16  # pictures that are judged together, the only ones held as numbers


@torch.no_grad()
def evaluate(
    pipe: Any,
    edit: Edit | Mapping[str, Edit],
    concept: Concept,
    *,
    probes: Sequence[Probe] | None = None,
    judge: Judge | Callable[[Tensor], Mapping[str, Sequence[str]]] | None = None,
    clip: Clip | None = None,
    rivals: bool | Sequence[str] = True,
    seeds: Iterable[int] = range(2),
    steps: int = 25,
    guidance: float = 7.5,
    size: tuple[int, int] | None = None,
    batch_size: int | str = "fit",
    window_seed: int = 0,
    windows: int = 1,
    folder: str | Path | Store | None = None,
    map: Map = map,
) -> Evaluation:
    """Ask `probes` of the unedited model, of the edit, and of its rivals.

    edit: an Edit that removes `concept`, or several by name, which are compared as they are.
    probes: by default those of the world of a mini (`loco.shapeland.probes`, without the prompts
    that the edits were made from), else the everyday ones of `probes_of`. judge: images -> names by
    attribute; by default the world's on a mini, else none, and CLIP-Score answers. clip: for that;
    by default the CLIP of a mini. rivals: compare one edit of text layers also with itself in all
    layers and in a random window of as many adjacent ones that has none of its own, drawn by
    window_seed; windows: in so many of them, whose rows tell how much one draw is worth. An edit of
    something else, of a text encoder or composed, has no rival then but "no edit". Or names of
    rivals, see `closed_form.rivals`: ["destroyer", "noise"]. size: (height, width)
    in pixels. folder: a store of pictures, one for all edits; an evaluation that was killed goes on
    from them with the same result. batch_size, map: as in `painting.paint`. Pictures are judged as
    they come, a few at a time.

    The pipeline is left as it was, bit for bit. Raises ValueError for an edit that belongs to
    another model, is applied already or is of another concept, for probes that are none, hold
    prompts the edit was made from or mix two questions in a group, and for what `paint` refuses.

        edit = loco.locoedit(pipe, concept, layers=[8, 9], lam=20)
        loco.evaluate(pipe, edit, concept, seeds=range(4)).summary()
    """
    model, seeds = family_of(pipe), checked_seeds(seeds)
    sampling = Sampling(steps, guidance, size=size).checked(model)
    edits = compared(pipe, edit, concept, rivals, window_seed, windows)
    probes, names = _asked(pipe, concept, probes, judge, known_prompts(edits))
    if names and names.size and sampling.size and sampling.size != names.size:
        raise ValueError(
            f"{names.name} reads images of {names.size[0]} x {names.size[1]} pixels, not of "
            f"{sampling.size[0]} x {sampling.size[1]}: leave size out, or pass another judge"
        )
    score = None
    if not all(probe.asks(names is not None) for probe in probes):
        score = by_clip(_clip_for(pipe) if clip is None else clip)
    prompts = list(dict.fromkeys(probe.prompt for probe in probes))
    pictures = [Picture(prompt, seed) for prompt in prompts for seed in seeds]
    store = Store.of(folder)
    outcomes, sheet = [], []
    with bar(len(edits), "evaluating", "edit") as progress:
        for each in edits.values():
            with nullcontext() if each is None else each.applied(pipe):
                stream = paint(
                    pipe, pictures, sampling, store=store, batch_size=batch_size, map=map
                )
                answers, first = _outcomes(iter(stream), prompts, len(seeds), probes, names, score)
            outcomes.append(answers)
            sheet.append(first)
            progress.update()
    made_by = records.provenance(
        pipe, seeds=seeds, steps=sampling.steps, guidance=sampling.guidance, size=sampling.size,
        edits={name: each and asdict(each.provenance) for name, each in edits.items()},
        judge=names and names.to_json(), score=score and score.to_json(),
        scheduler=type(pipe.scheduler).__name__, dtype=str(model.dtype),
    )  # fmt: skip
    return Evaluation(
        concept, tuple(edits), probes, names is not None,
        torch.stack(outcomes), torch.stack(sheet), made_by,
    )  # fmt: skip


def _asked(
    pipe: Any,
    concept: Concept,
    probes: Sequence[Probe] | None,
    judge: Judge | Callable[[Tensor], Mapping[str, Sequence[str]]] | None,
    seen: set[str],
) -> tuple[tuple[Probe, ...], Judge | None]:
    """The probes and the judge, given or by default; refuses what cannot be asked."""
    world = world_of(pipe)
    known = None if world is None else world.judge
    names = known if judge is None else judge_of(judge, known)
    if probes is None and world is not None:
        probes = world.probes(concept.kind, concept.name, exclude=seen)
    probes = probes_of(concept) if probes is None else tuple(probes)
    if not probes:
        raise ValueError("there are no probes: leave probes=None for the default ones")
    for probe in probes:
        if not isinstance(probe, Probe):
            raise TypeError(f"probes holds {probe!r}: make a loco_core.judging.probes.Probe")
    if made_from := [probe.prompt for probe in probes if probe.prompt.lower() in seen]:
        raise ValueError(
            f"{len(made_from)} probes, such as {made_from[0]!r}, ask prompts that the edit was "
            "made from: that tells nothing of others; take them out"
        )
    asks: dict[str, tuple[bool, bool]] = {}
    for probe in probes:
        question = probe.asks(names is not None), probe.wanted
        if asks.setdefault(probe.group, question) != question:
            raise ValueError(
                f"the probes of group {probe.group!r} ask two things: all need the same `wanted`, "
                "and an attribute, or none; put them in two groups"
            )
    return tuple(probes), names


def _clip_for(pipe: Any) -> Clip:
    try:
        return clip_for(pipe)
    except ValueError as error:
        raise ValueError(
            f"some probes need a CLIP, and {records.model_name(pipe)} brings none that loads: pass "
            'clip=loco.judging.clip_score.load_clip("openai/clip-vit-large-patch14"), or a '
            "judge and probes that each have an attribute"
        ) from error


def _outcomes(
    stream: Iterator[Tensor],
    prompts: list[str],
    seeds: int,
    probes: Sequence[Probe],
    judge: Judge | None,
    score: Score | None,
) -> tuple[Tensor, Tensor]:
    """([probe, seed] float64, [group, 3, H, W] the first image of every group) of uint8 pictures
    that come by prompt and seed."""
    found = torch.zeros(len(probes), seeds, dtype=torch.float64)
    asking: dict[str, list[int]] = {prompt: [] for prompt in prompts}
    for i, probe in enumerate(probes):
        asking[probe.prompt].append(i)
    firsts = {probe.group: prompts.index(probe.prompt) * seeds for probe in reversed(probes)}
    shown: dict[int, Tensor] = {}
    start = 0
    while pixels := list(islice(stream, AT_ONCE)):
        images = torch.stack(pixels).float().div(255)
        places = [divmod(start + k, seeds) for k in range(len(pixels))]
        cells = [(i, s, k) for k, (p, s) in enumerate(places) for i in asking[prompts[p]]]
        judged = [cell for cell in cells if probes[cell[0]].asks(judge is not None)]
        names = judge(images) if judge and judged else {}
        for i, s, k in judged:
            answers = names.get(str(probes[i].attribute), ())
            if len(answers) != len(images):
                raise ValueError(
                    f"the judge tells {len(answers)} times the {probes[i].attribute!r} of "
                    f"{len(images)} images; it knows {', '.join(names)}"
                )
            found[i, s] = float(answers[k] == probes[i].value)
        scored = [cell for cell in cells if not probes[cell[0]].asks(judge is not None)]
        if scored:
            assert score is not None  # `evaluate` found one for the probes without an attribute
            texts = [probes[i].text or probes[i].prompt for i, _, _ in scored]
            values = scores_of(score, images[[k for _, _, k in scored]], texts)
            for (i, s, _), value in zip(scored, values, strict=True):
                found[i, s] = value
        shown |= {
            k: images[k - start].clone() for k in firsts.values() if 0 <= k - start < len(images)
        }
        start += len(images)
    groups = dict.fromkeys(probe.group for probe in probes)
    return found, torch.stack([shown[firsts[group]] for group in groups])
