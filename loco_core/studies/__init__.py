"""STUDY: what an edit does, and what it costs."""
