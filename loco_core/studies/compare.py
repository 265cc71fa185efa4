"""What is compared: no edit, the edits, and one edit's rivals, itself in other layers."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..closed_form.rivals import ELSEWHERE, layers_of
from ..closed_form.rivals import rivals as rivals_of
from ..concepts import Concept
from ..edits.edit import Edit, parts_of
from .evaluation import UNEDITED

__all__ = ["compared", "known_prompts"]


def compared(
    pipe: Any,
    edit: Edit | Mapping[str, Edit],
    concept: Concept,
    rivals: bool | Sequence[str],
    window_seed: int = 0,
    windows: int = 1,
) -> dict[str, Edit | None]:
    """What is compared, by name; None, the first, is no edit.

    rivals: names of `closed_form.rivals`; True: the edit itself in other layers, if it is one of
    text layers.

    Raises ValueError for an edit of another concept or model and for one that is applied already,
    TypeError for what is no edit.
    """
    named = dict(edit) if isinstance(edit, Mapping) else {"edit": edit}
    if not named or UNEDITED in named:
        raise ValueError(f"edits are named {list(named)}: name at least one, none {UNEDITED!r}")
    for name, each in named.items():
        if not isinstance(each, Edit):
            raise TypeError(f"{name} is {each!r}: pass an Edit, or a dict of names and Edits")
        parts = parts_of(each.provenance.settings)
        own = {item["name"].lower() for part in parts for item in part["concepts"]}
        if own and concept.name.lower() not in own:
            raise ValueError(
                f"{each!r} is no edit of {concept.name!r}: pass the concept it was made from"
            )
        with each.applied(pipe):  # a wrong model is refused now, not after hours of sampling
            pass
    if rivals and isinstance(edit, Edit):
        named |= _rivals(pipe, edit, rivals, window_seed, windows)
    return {UNEDITED: None, **named}


def _rivals(
    pipe: Any, edit: Edit, asked: bool | Sequence[str], seed: int, windows: int
) -> dict[str, Edit]:
    if asked is not True:
        return rivals_of(pipe, edit, asked or (), seed=seed, windows=windows)
    if not layers_of(edit):
        return {}
    return rivals_of(pipe, edit, ELSEWHERE, seed=seed, windows=windows, equal_norm=False)


def known_prompts(edits: Mapping[str, Edit | None]) -> set[str]:
    """All prompts that the edits were made from, in lower case."""
    seen: set[str] = set()
    for part in (p for e in edits.values() if e for p in parts_of(e.provenance.settings)):
        seen |= {p.lower() for item in part["concepts"] for p in item["prompts"]}
        seen |= {p.lower() for p in (*part.get("preserve", ()), *(part.get("null_space") or ()))}
    return seen
