"""What an edit is compared with: itself, somewhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..edits.edit import Edit, make_edit
from ..edits.weights import chosen_layers, kind_of, projections
from ..families import family_of

__all__ = ["relocated"]


def relocated(pipe: Any, edit: Edit, layers: Sequence[int]) -> Edit:
    """The same edit in other text layers: what it does there is a test of where it was put.

    The map of an edit depends on the text alone, not on the weights, so it is put on the keys and
    values of `layers` as it stands, those for keys on keys and those for values on values.
    Raises ValueError for a layer that does not exist, and for an edit that is not one of whole
    text layers (of a text encoder, composed, or for another model).

        everywhere = relocated(pipe, edit, range(len(loco.text_layers(pipe))))
    """
    settings = edit.provenance.settings
    maps = {kind_of(name): change for name, change in edit.changes.items()}
    own = settings.get("layers")
    if (
        not own
        or not maps.keys() <= {"k", "v"}
        or set(edit.changes) != set(projections(pipe, own, tuple(maps)))
        or any(maps[kind_of(name)] is not change for name, change in edit.changes.items())
    ):
        raise ValueError(
            f"{edit!r} is no edit of the keys and values of some text layers of this pipeline: "
            "only one made by locoedit, uce or time_edit can be put in others"
        )
    with edit.applied(pipe):  # refuses one that was made for other weights
        pass
    chosen = [x.index for x in chosen_layers(family_of(pipe).text_layers, layers)]
    changes = {name: maps[kind_of(name)] for name in projections(pipe, chosen, tuple(maps))}
    return make_edit(pipe, changes, **{**settings, "layers": chosen})
