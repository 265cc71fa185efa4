"""TOUCH a pipeline, and leave it as it was: route text to layers, sample under it."""
