"""Efficacy, generality and specificity of an edit, against doing nothing and against doing it
elsewhere.

Every edit paints the same prompts from the same noise (`probes` says which, and what is asked), and
so does the unedited model: what it does not show, no edit can take credit for. A judge answers
where there is one, elsewhere CLIP-Score. `intervals` has the 95 % intervals, all over prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import records
from .._progress import bar
from .._warn import warn
from ..concepts import Concept
from ..families import family_of
from ..judging.clip_score import Clip, clip_for, clip_score
from ..judging.probes import Probe, probes_of
from ..painting.paint import checked_seeds, generate
from .evaluation import UNEDITED, Evaluation

if TYPE_CHECKING:
    from ..edits.edit import Edit

__all__ = ["Evaluation", "Probe", "evaluate", "probes_of"]

#: [n, 3, H, W] in [0, 1] -> attribute -> n names, such as `loco.shapeland.judge`.
Judge = Callable[[Tensor], Mapping[str, Sequence[str]]]


@torch.no_grad()
def evaluate(
    pipe: Any,
    edit: Edit | Mapping[str, Edit],
    concept: Concept,
    *,
    probes: Sequence[Probe] | None = None,
    judge: Judge | None = None,
    clip: Clip | None = None,
    rivals: bool = True,
    seeds: Iterable[int] = range(2),
    steps: int = 25,
    guidance: float = 7.5,
    batch_size: int = 16,
    window_seed: int = 0,
    folder: str | Path | None = None,
) -> Evaluation:
    """Ask `probes` of the unedited model, of the edit, and of its rivals.

    edit: an Edit that removes `concept`, or several by name, which are compared as they are.
    probes: by default those of Shapeland on its minis (`loco.shapeland.probes`, without the prompts
    that the edits were made from), else the everyday ones of `probes_of`. judge: images -> names by
    attribute; by default Shapeland's on its minis, else none, and CLIP-Score answers. clip: for
    that; by default the CLIP of a mini. rivals: compare one edit of text layers also with itself
    in all layers and in a random window of as many adjacent ones that has none of its own, drawn
    by window_seed. An edit of something else, of a text encoder or composed, has no rival but "no
    edit". folder: finished batches are kept there, a subfolder per edit, and an evaluation that
    was killed goes on from them with the same result. The images of one edit are in memory at a
    time.

    The pipeline is left as it was, bit for bit. Raises ValueError for an edit that belongs to
    another model, is applied already or is of another concept, for probes that are none, hold
    prompts the edit was made from or mix two questions in a group, and for what `generate` refuses.

        edit = loco.locoedit(pipe, concept, layers=[8, 9], lam=20)
        loco.evaluate(pipe, edit, concept, seeds=range(4)).summary()
    """
    seeds = checked_seeds(seeds)
    edits, seen = _compared(pipe, edit, concept, rivals, window_seed)
    probes, judge = _asked(pipe, concept, probes, judge, seen)
    if clip is None and not all(probe.asks(judge is not None) for probe in probes):
        clip = _clip_for(pipe)
    prompts = list(dict.fromkeys(probe.prompt for probe in probes))
    firsts = {probe.group: prompts.index(probe.prompt) for probe in reversed(probes)}
    groups = dict.fromkeys(probe.group for probe in probes)
    outcomes, sheet = [], []
    with bar(len(edits), "evaluating", "edit") as progress:
        for number, (name, each) in enumerate(edits.items()):
            part = f"{number}-{re.sub(r'[^a-z0-9]+', '-', name.lower())}"
            with nullcontext() if each is None else each.applied(pipe):
                made = generate(
                    pipe, prompts, seeds, steps, guidance, batch_size=batch_size,
                    folder=None if folder is None else Path(folder) / part,
                )  # fmt: skip
            images = made.mul(255).round().div(255)  # what a PNG would show
            outcomes.append(_outcomes(images, prompts, probes, judge, clip))
            sheet.append(torch.stack([images[firsts[group], 0] for group in groups]))
            progress.update()
    made_by = records.provenance(
        pipe, seeds=seeds, steps=steps, guidance=guidance, batch_size=batch_size,
        edits={name: each and asdict(each.provenance) for name, each in edits.items()},
        judge=None if judge is None else getattr(judge, "__qualname__", type(judge).__name__),
        scheduler=type(pipe.scheduler).__name__, dtype=str(family_of(pipe).denoiser.dtype),
    )  # fmt: skip
    return Evaluation(
        concept, tuple(edits), probes, judge is not None,
        torch.stack(outcomes), torch.stack(sheet), made_by,
    )  # fmt: skip


def _compared(
    pipe: Any, edit: Edit | Mapping[str, Edit], concept: Concept, rivals: bool, window_seed: int
) -> tuple[dict[str, Edit | None], set[str]]:
    """What is compared, by name, and all prompts that it was made from, in lower case."""
    # Editing lies below this wing: only what is handed an edit may know it, so it is met here.
    from ..edits.edit import Edit, parts_of

    named = dict(edit) if isinstance(edit, Mapping) else {"edit": edit}
    if not named or UNEDITED in named:
        raise ValueError(f"edits are named {list(named)}: name at least one, none {UNEDITED!r}")
    seen: set[str] = set()
    for name, each in named.items():
        if not isinstance(each, Edit):
            raise TypeError(f"{name} is {each!r}: pass an Edit, or a dict of names and Edits")
        parts = parts_of(each.provenance.settings)
        own = {item["name"].lower() for part in parts for item in part["concepts"]}
        if own and concept.name.lower() not in own:
            raise ValueError(
                f"{each!r} is no edit of {concept.name!r}: pass the concept it was made from"
            )
        for part in parts:
            kept = [*part.get("preserve", ()), *(part.get("null_space") or ())]
            seen |= {p.lower() for item in part["concepts"] for p in item["prompts"]}
            seen |= {p.lower() for p in kept}
        with each.applied(pipe):  # a wrong model is refused now, not after hours of sampling
            pass
    if rivals and not isinstance(edit, Mapping) and "layers" in edit.provenance.settings:
        named |= _rivals(pipe, edit, window_seed)
    return {UNEDITED: None, **named}, seen


def _rivals(pipe: Any, edit: Edit, window_seed: int) -> dict[str, Edit]:
    """The edit in a random window without its own layers, and in all layers."""
    from ..closed_form.rivals import relocated

    own, count = set(edit.provenance.settings["layers"]), len(family_of(pipe).text_layers)
    windows = [range(j, j + len(own)) for j in range(count - len(own) + 1)]
    free = [window for window in windows if not own & set(window)]
    found = {}
    if free:
        window = Random(window_seed).choice(free)
        found["random window"] = relocated(pipe, edit, window)
    else:
        warn(
            f"no window of {len(own)} adjacent layers of {count} is without layers of {edit!r}: it "
            "is compared with no random window"
        )
    if len(own) < count:
        found["all layers"] = relocated(pipe, edit, range(count))
    return found


def _asked(
    pipe: Any,
    concept: Concept,
    probes: Sequence[Probe] | None,
    judge: Judge | None,
    seen: set[str],
) -> tuple[tuple[Probe, ...], Judge | None]:
    """The probes and the judge, given or by default; refuses what cannot be asked."""
    # Shapeland lies below this wing too; its minis bring a judge and probes of their own.
    from ..worlds import shapeland
    from ..worlds.shapeland.planting import PLANTS

    if records.model_name(pipe) in PLANTS:
        judge = shapeland.judge if judge is None else judge
        if probes is None:
            name = concept.name.removeprefix("the emblem of ")
            probes = shapeland.probes(concept.kind, name, exclude=seen)
    probes = probes_of(concept) if probes is None else tuple(probes)
    if not probes:
        raise ValueError("there are no probes: leave probes=None for the default ones")
    for probe in probes:
        if not isinstance(probe, Probe):
            raise TypeError(f"probes holds {probe!r}: make a loco_core.judging.probes.Probe")
    if known := [probe.prompt for probe in probes if probe.prompt.lower() in seen]:
        raise ValueError(
            f"{len(known)} probes, such as {known[0]!r}, ask prompts that the edit was made from: "
            "that tells nothing of others; take them out"
        )
    asks: dict[str, tuple[bool, bool]] = {}
    for probe in probes:
        question = probe.asks(judge is not None), probe.wanted
        if asks.setdefault(probe.group, question) != question:
            raise ValueError(
                f"the probes of group {probe.group!r} ask two things: all need the same `wanted`, "
                "and an attribute, or none; put them in two groups"
            )
    return tuple(probes), judge


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
    images: Tensor,
    prompts: list[str],
    probes: Sequence[Probe],
    judge: Judge | None,
    clip: Clip | None,
) -> Tensor:
    """[probe, seed] float64 of images [prompt, seed, 3, H, W]."""
    seeds = images.shape[1]
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    found = torch.zeros(len(probes), seeds, dtype=torch.float64)
    judged = [i for i, probe in enumerate(probes) if probe.asks(judge is not None)]
    names = judge(images.flatten(0, 1)) if judge and judged else {}
    for i in judged:
        attribute, start = str(probes[i].attribute), rows[probes[i].prompt] * seeds
        if len(names.get(attribute, ())) != len(prompts) * seeds:
            raise ValueError(
                f"the judge tells {len(names.get(attribute, ()))} times the {attribute!r} of "
                f"{len(prompts) * seeds} images; it knows {', '.join(names)}"
            )
        answers = names[attribute][start : start + seeds]
        found[i] = torch.tensor([float(answer == probes[i].value) for answer in answers])
    scored = [i for i in range(len(probes)) if not probes[i].asks(judge is not None)]
    if scored:
        assert clip is not None  # `evaluate` found one for the probes without an attribute
        picked = torch.cat([images[rows[probes[i].prompt]] for i in scored])
        texts = [probes[i].text or probes[i].prompt for i in scored for _ in range(seeds)]
        found[scored] = clip_score(picked, texts, clip).double().unflatten(0, (-1, seeds))
    return found
