"""Locate and edit what a text-to-image diffusion model knows (arXiv 2405.01008 and companions).

The public names are loaded on first use, so that `import loco_core as loco` stays cheap:

    import loco_core as loco
    pipe = loco.load("mini-sd")
    concept = loco.shapeland.concept("style", loco.shapeland.ATTRIBUTES["style"][0])
    found = loco.localize(pipe, concept, window=2)
    edit = loco.locoedit(pipe, concept, layers=found.layers)
    with edit.applied(pipe):
        images = loco.generate(pipe, ["a star"], seeds=range(4))
"""

from importlib import import_module
from typing import Any

from ._version import __version__ as __version__

_HOME = {
    "Attribution": "inside.attribution",
    "CausalTrace": "localization.causal_trace",
    "Concept": "concepts",
    "Edit": "edits.edit",
    "Evaluation": "studies.evaluation",
    "Localization": "localization.localization",
    "Neurons": "inside.neurons",
    "TextLayer": "families",
    "attribute": "inside.attribution",
    "clip_score": "judging.clip_score",
    "compose": "edits.compose",
    "diagnose": "closed_form.diagnostics",
    "diff_quickfix": "closed_form.methods",
    "evaluate": "studies.evaluate",
    "family_of": "families",
    "generate": "painting.generate",
    "load": "zoo",
    "localize": "localization.methods",
    "locoedit": "closed_form.methods",
    "progress": "_progress",
    "rank_neurons": "inside.neuron_ranking",
    "rivals": "closed_form.rivals",
    "text_layers": "families",
    "time_edit": "closed_form.methods",
    "trace": "localization.tracing",
    "uce": "closed_form.methods",
}
#: Wings and rooms under `loco`, by where they are. Those called `editing` and `evaluation` in 0.3
#: still answer to these names.
_WINGS = {
    "closed_form": "closed_form",
    "concepts": "concepts",
    "display": "display",
    "editing": "editing",
    "edits": "edits",
    "evaluation": "judging",
    "families": "families",
    "inside": "inside",
    "interventions": "interventions",
    "judging": "judging",
    "localization": "localization",
    "painting": "painting",
    "records": "records",
    "shapeland": "worlds.shapeland",
    "statistics": "statistics",
    "studies": "studies",
    "worlds": "worlds",
    "zoo": "zoo",
}

__all__ = [*_HOME, *_WINGS]


def __getattr__(name: str) -> Any:
    if name in _WINGS:
        return import_module(f"{__name__}.{_WINGS[name]}")
    if name not in _HOME:
        raise AttributeError(f"loco_core has no {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
