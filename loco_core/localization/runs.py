"""The calls of the pipeline that causal tracing is made of: texts with noise, rows with copies."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..concepts import Concept
from ..families import TextStates, family_of
from ..families.running import plain
from ..interventions.patching import added, copies, rewriting
from ..interventions.routing import refuse_compiled
from ..painting import paint as sampling
from .sites import Site, module_of

NOISE_SEED = 2310_13730  # far from the seeds that people choose: those draw the start noise
STDS = 3  # the default noise, in standard deviations of the concept's token embeddings

Row = tuple[int, int]  # of the table of results: 0 clean, 1 corrupted, 2.. sites; and the draw
CLEAN: Row = (0, 0)


@dataclass(frozen=True, eq=False)
class Corruption:
    """The noise of one prompt. first, last: the subject's tokens. noise: [draw, token, width] for
    the token embedding of each text encoder."""

    first: int
    last: int
    noise: dict[nn.Module, Tensor]


@dataclass(frozen=True)
class Job:
    """One call of the pipeline. texts, seeds: per row. sites: the sites each row is given from
    row 0. cells: (row of the call, row of the table, seed number) of each score it yields."""

    texts: list[int]
    seeds: list[int]
    sites: dict[int, tuple[Site, ...]]
    cells: list[tuple[int, Row, int]]


def corruptions(
    pipe: Any, concept: Concept, std: float | None, draws: int
) -> tuple[list[float], list[Corruption]]:
    """(std of the noise by text encoder, the noise of each prompt).

    std None: `STDS` times that of all entries of the embeddings of the subject's tokens in the
    concept's prompts. The noise of a prompt does not depend on how many draws are made.
    """
    model = family_of(pipe)
    spans = [model.subject_span(prompt, concept.name) for prompt in concept.prompts]
    ids = model.tokenize(concept.prompts)
    subject = torch.cat([row[a : b + 1] for row, (a, b) in zip(ids, spans, strict=True)]).unique()
    roots = dict.fromkeys(path.partition(".")[0] for path in model.text_encoders)
    for root in roots:
        refuse_compiled(getattr(pipe, root))
    tables = [plain(getattr(pipe, root)).get_input_embeddings() for root in roots]
    if std is None:
        words = [table.weight[subject.to(table.weight.device)].double() for table in tables]
        stds = [STDS * float(x.std(correction=0)) for x in words]
    else:
        stds = [std for _ in tables]
    for value in stds:
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            raise ValueError(
                f"noise {value!r} corrupts nothing: pass a standard deviation above 0, or None for "
                f"{STDS} times that of the embeddings of {concept.name!r}"
            )
    found = []
    for p, (first, last) in enumerate(spans):
        generator = torch.Generator().manual_seed(NOISE_SEED + p)
        drawn: dict[nn.Module, list[Tensor]] = {table: [] for table in tables}
        for _ in range(draws):
            for table, s in zip(tables, stds, strict=True):
                shape = last - first + 1, table.embedding_dim
                drawn[table].append(s * torch.randn(shape, generator=generator))
        noise = {table: torch.stack(each) for table, each in drawn.items()}
        found.append(Corruption(first, last, noise))
    return stds, found


def checked_calls(
    pipe: Any, where: str, steps: int, restore_steps: Iterable[int] | None
) -> list[int] | None:
    """`restore_steps` as a sorted list; refuses what is not a call of the denoiser."""
    if restore_steps is None:
        return None
    if where != "unet":
        raise ValueError(
            'restore_steps is for where="unet": the text encoder runs once, before the first step'
        )
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    most, calls = len(scheduler.timesteps), list(restore_steps)
    wrong = [c for c in calls if isinstance(c, bool) or c not in range(most)]
    if wrong or not calls:
        raise ValueError(
            f"restore_steps {wrong or calls}: choose from the calls 0 to {most - 1} of this run"
        )
    return sorted(set(calls))


def plan(
    pipe: Any,
    prompt: str,
    noised: Corruption,
    groups: Sequence[tuple[Site, ...]],
    where: str,
    rows: list[Row],
    seeds: list[int],
    size: int,
) -> tuple[TextStates, list[Job]]:
    """The texts of one prompt, and the calls that make its images."""
    if where == "unet":  # row 0 of every call is the clean run that its other rows copy from
        draws = [(1, d) for d in sorted({d for _, d in rows})]
        texts = _encode(pipe, prompt, noised, (), draws, size)
        jobs = []
        for k, seed in enumerate(seeds):
            for number, chunk in enumerate(_chunks(rows, size - 1)):
                cells = [(b, row, k) for b, row in enumerate(chunk, 1)]
                jobs.append(
                    Job(
                        texts=[0, *(1 + d for _, d in chunk)],
                        seeds=[seed] * (1 + len(chunk)),
                        sites={b: groups[r - 2] for b, (r, _), _ in cells if r > 1},
                        cells=cells if number else [(0, CLEAN, k), *cells],
                    )
                )
    else:  # the text encoder runs before the first step: what differs is only the text
        texts = _encode(pipe, prompt, noised, groups, rows, size)
        first, place = _distinct(texts)
        texts, table = texts[first], [CLEAN, *rows]
        jobs = []
        for chunk in _chunks([(t, k) for k in range(len(seeds)) for t in range(len(first))], size):
            cells = [
                (b, row, k)
                for b, (t, k) in enumerate(chunk)
                for row, at in zip(table, place, strict=True)
                if at == t
            ]
            jobs.append(Job([t for t, _ in chunk], [seeds[k] for _, k in chunk], {}, cells))
    return texts, jobs


def _encode(
    pipe: Any,
    prompt: str,
    noised: Corruption,
    groups: Sequence[tuple[Site, ...]],
    rows: list[Row],
    size: int,
) -> TextStates:
    """Text states of the clean prompt, then of `rows`: corrupted, with group r - 2 restored."""
    found: list[TextStates] = []
    for chunk in _chunks(rows, size - 1):
        draws = [d for _, d in chunk]
        edits = {
            table: added(torch.cat([torch.zeros_like(noise[:1]), noise[draws]]), noised.first)
            for table, noise in noised.noise.items()
        }
        gets = {
            b: [(module_of(pipe, site), noised.last + site.token) for site in groups[r - 2]]
            for b, (r, _) in enumerate(chunk, 1)
            if r > 1
        }
        with rewriting(edits | copies(0, gets)):
            states = family_of(pipe).encode([prompt] * (1 + len(chunk)))
        found.append(states[1:] if found else states)
    return _joined(found)


def run(
    pipe: Any,
    texts: TextStates,
    negative: TextStates,
    job: Job,
    steps: int,
    guidance: float,
    calls: list[int] | None,
    progress: Any,
) -> Tensor:
    """Images of one job, [row, 3, H, W] float32 in [0, 1]."""
    model = family_of(pipe)
    place = model.conditional_rows(len(job.texts), guidance).tolist()
    gets = {
        place[b]: [(module_of(pipe, site), None) for site in group]
        for b, group in job.sites.items()
    }
    with rewriting(copies(place[0], gets), model.denoiser, calls):
        return sampling.sample_batch(
            pipe, texts, texts[job.texts], negative, job.seeds, None, steps, guidance, 0.0, progress
        )


def _distinct(texts: TextStates) -> tuple[list[int], list[int]]:
    """(the first row of each distinct text, and for every row the number of its own).

    Noise does not reach the tokens before it in a causal encoder: to restore them changes nothing,
    and the image of the corrupted prompt serves them all.
    """
    known: dict[bytes, int] = {}
    first, place = [], []
    for i in range(len(texts)):
        values = [x[i].cpu().contiguous() for x in (texts.embeds, texts.pooled) if x is not None]
        key = b"".join(bytes(x.view(torch.uint8).numpy()) for x in values)
        if key not in known:
            known[key] = len(known)
            first.append(i)
        place.append(known[key])
    return first, place


def _joined(parts: list[TextStates]) -> TextStates:
    """Tables of texts one after the other."""
    columns = {
        field.name: [getattr(part, field.name) for part in parts]
        for field in dataclasses.fields(TextStates)
    }
    whole: dict[str, Any] = {
        name: None if column[0] is None else torch.cat(column) for name, column in columns.items()
    }
    return TextStates(**whole)


def _chunks(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))
