"""WORLDS whose answers are known, and the training of models in them."""

from .world import World, world_of

__all__ = ["World", "world_of"]
