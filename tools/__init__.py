"""The project's own machinery: execute the notebooks, build the book, check it, pin versions."""
