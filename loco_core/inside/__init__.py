"""SINGLE OUT neurons and weights, and change just these."""

from .attribution import Attribution, attribute
from .fidelity import fidelity
from .neuron_ranking import rank_neurons
from .neurons import Neurons
from .rounds import erase_in_rounds

__all__ = ["Attribution", "Neurons", "attribute", "erase_in_rounds", "fidelity", "rank_neurons"]
