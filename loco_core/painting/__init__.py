"""PAINT: a picture is a value, and one room paints it."""
