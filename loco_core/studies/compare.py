"""What is compared: no edit, the edits, and one edit's rivals, itself in other layers."""

from collections.abc import Mapping
from random import Random
from typing import Any

from .._warn import warn
from ..closed_form.rivals import relocated
from ..concepts import Concept
from ..edits.edit import Edit, parts_of
from ..families import family_of
from ..families.checks import whole_number
from .evaluation import UNEDITED

__all__ = ["compared", "known_prompts", "rivals_of"]


def compared(
    pipe: Any,
    edit: Edit | Mapping[str, Edit],
    concept: Concept,
    rivals: bool,
    window_seed: int = 0,
    windows: int = 1,
) -> dict[str, Edit | None]:
    """What is compared, by name; None, the first, is no edit.

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
    if rivals and isinstance(edit, Edit) and "layers" in edit.provenance.settings:
        named |= rivals_of(pipe, edit, window_seed, windows)
    return {UNEDITED: None, **named}


def known_prompts(edits: Mapping[str, Edit | None]) -> set[str]:
    """All prompts that the edits were made from, in lower case."""
    seen: set[str] = set()
    for part in (p for e in edits.values() if e for p in parts_of(e.provenance.settings)):
        seen |= {p.lower() for item in part["concepts"] for p in item["prompts"]}
        seen |= {p.lower() for p in (*part.get("preserve", ()), *(part.get("null_space") or ()))}
    return seen


def rivals_of(pipe: Any, edit: Edit, window_seed: int = 0, windows: int = 1) -> dict[str, Edit]:
    """The edit in random windows without its own layers, and in all layers.

    windows: how many, drawn one after another by window_seed, none twice; the more, the better one
    sees that it is not one window's luck. Raises ValueError for more than there are.
    """
    own, count = set(edit.provenance.settings["layers"]), len(family_of(pipe).text_layers)
    every = [range(j, j + len(own)) for j in range(count - len(own) + 1)]
    free = [window for window in every if not own & set(window)]
    found = {}
    if free:
        draws = whole_number(windows, 1, len(free))
        if draws is None:
            raise ValueError(
                f"windows={windows!r}: {len(free)} windows have none of the layers of {edit!r}; "
                f"choose from 1 to {len(free)}"
            )
        rng = Random(window_seed)
        for draw in range(draws):
            window = rng.choice(free)
            free.remove(window)
            name = f"random window {draw + 1}" if draw else "random window"
            found[name] = relocated(pipe, edit, window)
    else:
        warn(
            f"no window of {len(own)} adjacent layers of {count} is without layers of {edit!r}: it "
            "is compared with no random window"
        )
    if len(own) < count:
        found["all layers"] = relocated(pipe, edit, range(count))
    return found
