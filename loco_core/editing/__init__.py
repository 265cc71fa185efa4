"""CHANGE the weights: the closed-form solver, the Edit it makes, and the methods built on both."""

from . import closed_form
from .attribution import Attribution
from .cad import attribute, erase_in_rounds
from .compose import compose
from .cross_attention import locoedit, time_edit, uce
from .diagnostics import diagnose
from .edit import Edit
from .fidelity import fidelity
from .knockout import Knockout
from .neuron_ranking import rank_neurons
from .neurons import Neurons
from .quickfix import diff_quickfix

__all__ = [
    "Attribution",
    "Edit",
    "Knockout",
    "Neurons",
    "attribute",
    "erase_in_rounds",
    "closed_form",
    "compose",
    "diagnose",
    "diff_quickfix",
    "fidelity",
    "locoedit",
    "rank_neurons",
    "time_edit",
    "uce",
]
