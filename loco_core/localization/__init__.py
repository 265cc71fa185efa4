"""FIND the layers that a concept enters through."""
