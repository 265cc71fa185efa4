"""TOUCH a pipeline, and leave it as it was."""
