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

__version__ = "0.3.0"

_HOME = {
    "Attribution": "editing.attribution",
    "CausalTrace": "localization.tracing",
    "Concept": "concepts",
    "Edit": "editing.edit",
    "Evaluation": "evaluation.result",
    "Localization": "localization.locogen",
    "Neurons": "editing.neurons",
    "TextLayer": "families",
    "attribute": "editing.cad",
    "clip_score": "evaluation.clip_score",
    "compose": "editing.compose",
    "diagnose": "editing.diagnostics",
    "diff_quickfix": "editing.quickfix",
    "evaluate": "evaluation.evaluate",
    "family_of": "families",
    "generate": "interventions.sampling",
    "load": "zoo",
    "localize": "localization.locogen",
    "locoedit": "editing.cross_attention",
    "progress": "_progress",
    "rank_neurons": "editing.neuron_ranking",
    "text_layers": "families",
    "time_edit": "editing.cross_attention",
    "trace": "localization.tracing",
    "uce": "editing.cross_attention",
}
_WINGS = (
    "concepts",
    "display",
    "editing",
    "evaluation",
    "families",
    "interventions",
    "localization",
    "records",
    "shapeland",
    "zoo",
)

__all__ = [*_HOME, *_WINGS]


def __getattr__(name: str) -> Any:
    if name in _WINGS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"loco_core has no {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
