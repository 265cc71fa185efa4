from . import closed_form as closed_form
from . import concepts as concepts
from . import display as display
from . import editing as editing
from . import edits as edits
from . import families as families
from . import inside as inside
from . import interventions as interventions
from . import judging as evaluation
from . import judging as judging
from . import localization as localization
from . import painting as painting
from . import records as records
from . import statistics as statistics
from . import studies as studies
from . import worlds as worlds
from . import zoo as zoo
from ._progress import progress as progress
from ._version import __version__ as __version__
from .closed_form.diagnostics import diagnose as diagnose
from .closed_form.methods import diff_quickfix as diff_quickfix
from .closed_form.methods import locoedit as locoedit
from .closed_form.methods import time_edit as time_edit
from .closed_form.methods import uce as uce
from .closed_form.rivals import rivals as rivals
from .concepts import Concept as Concept
from .edits.compose import compose as compose
from .edits.edit import Edit as Edit
from .families import TextLayer as TextLayer
from .families import family_of as family_of
from .families import text_layers as text_layers
from .inside.attribution import Attribution as Attribution
from .inside.attribution import attribute as attribute
from .inside.neuron_ranking import rank_neurons as rank_neurons
from .inside.neurons import Neurons as Neurons
from .judging.clip_score import clip_score as clip_score
from .localization.causal_trace import CausalTrace as CausalTrace
from .localization.localization import Localization as Localization
from .localization.methods import localize as localize
from .localization.tracing import trace as trace
from .painting.generate import generate as generate
from .studies.evaluate import evaluate as evaluate
from .studies.evaluation import Evaluation as Evaluation
from .worlds import shapeland as shapeland
from .zoo import load as load

__all__ = [
    "Attribution",
    "CausalTrace",
    "Concept",
    "Edit",
    "Evaluation",
    "Localization",
    "Neurons",
    "TextLayer",
    "attribute",
    "clip_score",
    "closed_form",
    "compose",
    "concepts",
    "diagnose",
    "diff_quickfix",
    "display",
    "editing",
    "edits",
    "evaluate",
    "evaluation",
    "families",
    "family_of",
    "generate",
    "inside",
    "interventions",
    "judging",
    "load",
    "localization",
    "localize",
    "locoedit",
    "painting",
    "progress",
    "rank_neurons",
    "records",
    "rivals",
    "shapeland",
    "statistics",
    "studies",
    "text_layers",
    "time_edit",
    "trace",
    "uce",
    "worlds",
    "zoo",
]
