"""What can be asked on the command line: options that several commands share, and how they read.

A concept is KIND:NAME or a file. On a mini KIND:NAME is Shapeland's (`loco.shapeland.concept`); on
any other model style:NAME and object:NAME are the prompts of the papers (`loco.concepts`). A file
has the fields of `loco.Concept` in JSON or YAML: name, kind, prompts, neutral, target.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, BadParameter, Option

import loco_core as loco


def _minis(incomplete: str) -> list[str]:
    return [name for name in loco.zoo.minis() if name.startswith(incomplete)]


def _concepts(incomplete: str) -> list[str]:
    known = loco.shapeland.ATTRIBUTES.items()
    return [
        full for kind, names in known for name in names
        if (full := f"{kind}:{name}").startswith(incomplete)
    ]  # fmt: skip


Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="A mini (loco models), a folder, or a Hub id.",
        autocompletion=_minis,
    ),
]
Device = Annotated[str | None, Option(help="cpu (the default), cuda, cuda:1, ...")]
Dtype = Annotated[
    Literal["float16", "bfloat16", "float32", "float64"], Option(help="Of the weights.")
]
Out = Annotated[Path, Option(help="Folder for the results.")]
Force = Annotated[bool, Option("--force", help="Replace an older result.")]
Resume = Annotated[bool, Option("--resume", help="Go on with a run that was killed.")]
Json = Annotated[bool, Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, Option("--quiet", help="No progress bars.")]
Debug = Annotated[bool, Option("--debug", help="With an error, show where it arose.")]

ConceptText = Annotated[
    str,
    Option("--concept", help='KIND:NAME ("style:Mira Holt") or a file.', autocompletion=_concepts),
]
ConceptOrNone = Annotated[
    str | None,
    Option(
        "--concept",
        help="KIND:NAME or a file; by default that of the localization or edit named.",
        autocompletion=_concepts,
    ),
]
Layers = Annotated[str | None, Option(help="Text layers: 8,9 or 7-9.")]
WindowFrom = Annotated[str | None, Option(help="A localization, whose layers are meant.")]
Preserve = Annotated[
    list[str] | None, Option(help="A prompt to keep, or a file with one a line; repeatable.")
]
Prompts = Annotated[int, Option(help="How many prompts, for a concept of Shapeland.", min=1)]
Seeds = Annotated[str, Option(help="Numbers and ranges: 0,2 or 0-3.")]
Steps = Annotated[int, Option(help="Of sampling.")]
Guidance = Annotated[float, Option(help="Scale of classifier-free guidance.")]
Batch = Annotated[int, Option(help="Images at a time.")]
ClipName = Annotated[
    str | None, Option("--clip", help="CLIP that scores: a folder or Hub id; a mini brings one.")
]


def numbers(text: str) -> list[int]:
    """`"0,2,5-7"` as [0, 2, 5, 6, 7]; anything else is a wrong command line."""
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        span = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else ()
        if not span:
            raise BadParameter(f"{text!r} is not numbers and ranges, such as 0,2 or 0-3")
        found += span
    return found


def window(text: str) -> int | str:
    """The size of a window: a number of layers, or "smallest"."""
    if text == "smallest" or text.isdecimal():
        return int(text) if text.isdecimal() else text
    raise BadParameter(f'--window {text!r} is neither a number of layers nor "smallest"')


def lines(texts: Sequence[str]) -> list[str]:
    """The texts; of one that names a file, its lines."""
    found = []
    for text in texts:
        if os.path.isfile(text):
            found += [line.strip() for line in Path(text).read_text().splitlines() if line.strip()]
        else:
            found.append(text)
    return found


def pictures(paths: Sequence[str]) -> Any:
    """Image files of one size as [n, 3, H, W] in [0, 1]."""
    import numpy
    import torch
    from PIL import Image

    found = [torch.from_numpy(numpy.array(Image.open(path).convert("RGB"))) for path in paths]
    if len({image.shape for image in found}) > 1:
        raise ValueError(f"the images {', '.join(paths)} are not of one size: resize them")
    return torch.stack(found).permute(0, 3, 1, 2) / 255


def read(path: str | Path) -> Any:
    """What a JSON or YAML file holds; raises ValueError with the reason if it is damaged."""
    import yaml

    text = Path(path).read_text()
    try:
        return json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def concept_of(pipe: Any, text: str, prompts: int) -> Any:
    """The Concept that `text` means for `pipe`, see above."""
    if os.path.isfile(text):
        fields = read(text)
        try:
            return loco.Concept(**fields)
        except TypeError:
            raise ValueError(
                f"{text} is no concept: it needs name, kind, prompts and neutral, and may have "
                "target, each prompt and its neutral twin at the same place of their lists"
            ) from None
    kind, colon, name = text.partition(":")
    if not colon or not name:
        raise ValueError(
            f"concept {text!r} is neither a file nor KIND:NAME, such as 'style:Mira Holt'"
        )
    if on_shapeland(pipe):
        return loco.shapeland.concept(kind, name, prompts=prompts)
    makers = {"style": loco.concepts.style, "object": loco.concepts.object}
    if kind not in makers:
        raise ValueError(
            f"concept {text!r}: outside of Shapeland only style:NAME and object:NAME have prompts "
            "of their own; name a JSON or YAML file with name, kind, prompts and neutral"
        )
    return makers[kind](name)


def on_shapeland(pipe: Any) -> bool:
    """Whether `pipe` is a mini."""
    from ..worlds.shapeland.planting import PLANTS

    return loco.records.model_name(pipe) in PLANTS


def planted(pipe: Any, kind: str) -> list[int] | None:
    """The layers in which attributes of this kind were planted, if they were."""
    if not on_shapeland(pipe):
        return None
    return loco.shapeland.truth(loco.records.model_name(pipe)).get(kind)


def located(pipe: Any, layers: str | None, window_from: str | None) -> tuple[Any, Any]:
    """(layers, concept) as they are named, or those of the localization saved in `window_from`.

    What is not named is None. Refuses the localization of another model.
    """
    if window_from is None:
        return layers and numbers(layers), None
    if layers:
        raise BadParameter("--layers and --window-from both name layers: give one of them")
    found, here = loco.Localization.load(window_from), loco.records.provenance(pipe)
    if found.provenance.fingerprint != here.fingerprint:
        raise ValueError(
            f"{window_from} was found on {found.provenance.model}, whose weights are not those of "
            f"this {here.model}: localize on this model, or name the --layers"
        )
    return list(found.layers), found.concept


def load_edit(path: str) -> Any:
    """The edit in a result folder, or in a file."""
    return loco.Edit.load(Path(path) / "edit.safetensors" if os.path.isdir(path) else path)


def load_clip(pipe: Any, name: str | None) -> Any:
    """The CLIP called `name`, or the one that a mini brings."""
    from ..judging import clip_score

    if name is not None:
        return clip_score.load_clip(name, pipe.device)
    try:
        return clip_score.clip_for(pipe)
    except ValueError:
        raise ValueError(
            f"no CLIP comes with {loco.records.model_name(pipe)}: name one, for example "
            "--clip openai/clip-vit-large-patch14"
        ) from None
