"""The table of localisers: one interface, one result.

A localiser lists pictures and folds their scores into a `Localization`. To add one: a function
with this interface, and a line in `METHODS`.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .._warn import warn
from ..concepts import Concept
from ..families import family_of
from ..judging.score import score_of
from ..painting.paint import Map
from ..painting.picture import Sampling, checked_seeds
from ..painting.store import Store
from .localization import Localization
from .locogen import locogen
from .sweep import Painting
from .tracing import traced_layers

__all__ = ["METHODS", "localize"]

#: Method -> (model, concept, painting, score, *, window, seeds, **own settings) -> Localization.
METHODS: dict[str, Callable[..., Localization]] = {"locogen": locogen, "tracing": traced_layers}


def localize(
    pipe: Any,
    concept: Concept,
    window: int | str = 2,
    seeds: Iterable[int] = range(4),
    *,
    method: str = "locogen",
    steps: int = 25,
    guidance: float = 7.5,
    size: tuple[int, int] | None = None,
    batch_size: int | str = "fit",
    score: Any = None,
    folder: str | Path | Store | None = None,
    map: Map = map,
    **settings: Any,
) -> Localization:
    """Sweep windows of adjacent text layers over `concept` and find where it enters.

    window: layers that are changed together, or "smallest" (LocoGen): 1, 2, ... until the best
    window does what replacing the text in every layer does, by paired tests
    (`statistics.reaches_neutral`), or until its mean score reaches `threshold`.
    method: "locogen", windows read the neutral text; "tracing", the words are drowned in noise and
    the cross-attention of a window of text layers is restored (`loco.trace` has all other sites).
    settings: of LocoGen, neutral: "twin" (concept.neutral) or "target" (concept.target), by default
    the twin and for a fact the target; pooled: "keep" or "swap", for a family with a pooled
    embedding (SD-XL); threshold. Of tracing, noise and draws, as in `loco.trace`.
    score: (images [n, 3, H, W] in [0, 1], texts) -> [n], or a `judging.score.Score`; by default
    CLIP-Score with the CLIP of a mini. size: (height, width) in pixels. folder: a store, in which
    every picture is kept; a killed sweep goes on from there with the same result, and what another
    sweep has painted is not painted again. Without it, pictures lie in a temporary folder for as
    long as the result lives. batch_size, map: as in `painting.paint`.

    `found.layers` is empty if no window passes the test (`found.test.verdict`: "none", or
    "undecided" with fewer than 5 pictures, of which a warning tells); `found.best` is the argmin
    all the same.
    Raises ValueError on a window larger than the model, a concept cut off by the tokenizer, a
    seed given twice, "swap" for a family without a pooled embedding and what `paint` refuses.

        found = loco.localize(pipe, loco.shapeland.concept("style", name), window=2)
        found.layers, found.test.p, found.to_frame()
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose from {', '.join(METHODS)}")
    model, seeds = family_of(pipe), checked_seeds(seeds)
    store = Store.of(folder) or Store.temporary()
    sampling = Sampling(steps, guidance, size=size).checked(model)
    painting = Painting(sampling, store, batch_size, map)
    localizer = METHODS[method]
    known = localizer.__kwdefaults__ or {}
    if unknown := [name for name in settings if name not in known]:
        raise TypeError(
            f"{unknown[0]!r} is no setting of method={method!r}: choose from {', '.join(known)}"
        )
    found = localizer(
        model, concept, painting, score_of(pipe, score), window=window, seeds=seeds, **settings
    )
    if found.test.verdict == "undecided":
        warn(
            f"{found.test.n} pictures of {concept.name!r} cannot decide whether a window does "
            f"anything: no layers are found. Pass more prompts or seeds, 5 pictures at least; "
            f".best, {found.best}, is the window with the largest effect, untested"
        )
    return found
