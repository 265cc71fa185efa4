"""JUDGE a picture: a CLIP's score of image and text, and what is asked of an edit's images."""

from .clip_score import clip_for, load_clip
from .probes import Probe, misspellings, probes_of

__all__ = ["Probe", "clip_for", "load_clip", "misspellings", "probes_of"]
