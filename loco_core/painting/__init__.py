"""PAINT: a picture is a value, and one room paints it."""

from .engines import engine
from .generate import generate
from .images import Images
from .paint import paint
from .picture import Noise, Picture, Sampling
from .store import Store

__all__ = ["Images", "Noise", "Picture", "Sampling", "Store", "engine", "generate", "paint"]
