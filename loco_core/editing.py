"""The wing `loco.editing` of 0.3, which is now three: `edits`, `closed_form` and `inside`.

It hands on the names that it offered then; new code takes them from `loco` itself.
"""

from .closed_form import diagnose, diff_quickfix, locoedit, time_edit, uce
from .closed_form import solver as closed_form
from .edits import Edit, Knockout, compose
from .inside import Attribution, Neurons, attribute, erase_in_rounds, fidelity, rank_neurons

__all__ = [
    "Attribution",
    "Edit",
    "Knockout",
    "Neurons",
    "attribute",
    "closed_form",
    "compose",
    "diagnose",
    "diff_quickfix",
    "erase_in_rounds",
    "fidelity",
    "locoedit",
    "rank_neurons",
    "time_edit",
    "uce",
]
