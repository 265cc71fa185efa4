"""Several edits as one: a product of maps, a union of knock-outs."""

from __future__ import annotations

import dataclasses

from .change import Change
from .edit import Edit, joint
from .weights import matches

__all__ = ["compose"]


def compose(first: Edit, second: Edit) -> Edit:
    """One edit that does what `first` does and then `second`: W' = W T_first T_second.

    A map depends on what its weights read, not on the weights, so this equals, up to rounding,
    applying `first` and then making and applying `second` on the edited pipeline; unless `first`
    edits the text encoder in front of what `second` edits, which then would read other keys. The
    order matters where both move the same directions. Ranks add up; entries that both knock out get
    both factors. Raises ValueError where both change a weight and were made for different values of
    it, and where a map and a knock-out meet on one weight.

        both = loco.compose(no_van_gogh, no_monet)
    """
    others = second.originals
    clash = [n for n, mark in first.originals.items() if not matches(mark, others.get(n, mark))]
    if clash:
        raise ValueError(
            f"{first!r} and {second!r} are not for the same weights ({clash[0]} differs): make "
            "both on the same unedited pipeline"
        )
    originals = {**first.originals, **second.originals}
    mixed = [
        n
        for n, change in first.changes.items()
        if type(second.changes.get(n, change)) is not type(change)
    ]
    if mixed:
        raise ValueError(
            f"{first!r} and {second!r} cannot be one edit: {mixed[0]} is changed by a map and by a "
            "knock-out; apply the first, make the second on the edited pipeline, and apply it"
        )
    joined: dict[tuple[Change | None, Change | None], Change] = {}
    for name in originals:
        a, b = pair = first.changes.get(name), second.changes.get(name)
        joined[pair] = a.then(b) if a and b else a or b  # type: ignore[assignment]
    changes = {n: joined[first.changes.get(n), second.changes.get(n)] for n in originals}
    parts = [{**e.provenance.settings, "weights": list(e.changes)} for e in (first, second)]
    made = dataclasses.replace(
        first.provenance,
        fingerprint=joint(originals),
        settings={"method": "compose", "parts": parts},
    )
    return Edit(changes, originals, made)
