"""How what is asked on the command line reads: numbers, files, concepts, results of other commands.

A concept is KIND:NAME or a file. On a mini KIND:NAME is Shapeland's (`loco.shapeland.concept`); on
any other model style:NAME and object:NAME are the prompts of the papers (`loco.concepts`). A file
has the fields of `loco.Concept` in JSON or YAML: name, kind, prompts, neutral, target.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from typer import BadParameter

import loco_core as loco


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


def batch(text: int | str) -> int | str:
    """The size of a batch: a number of images, or "fit"."""
    text = str(text)
    if text == "fit" or text.isdecimal() and int(text):
        return text if text == "fit" else int(text)
    raise BadParameter(f'{text!r} is neither a number of images from 1 on nor "fit"')


def size(height: int | None, width: int | None) -> tuple[int, int] | None:
    """(height, width) in pixels, or None for the model's own."""
    if height is None and width is None:
        return None
    if height is None or width is None:
        raise BadParameter("--height and --width go together: give both, or neither")
    return height, width


def only_those(asked: Mapping[str, Any], takes: Iterable[str], method: str) -> dict[str, Any]:
    """The settings that were given; refuses those that `method` does not take."""
    given = {name: value for name, value in asked.items() if value is not None}
    if wrong := [name for name in given if name not in set(takes)]:
        raise BadParameter(
            f"--{wrong[0].replace('_', '-')} is not for --method {method}: leave it out"
        )
    return given


def filled(asked: Mapping[str, Any], otherwise: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked, and where nothing was (None), what is taken otherwise."""
    return {n: otherwise[n] if value is None else value for n, value in asked.items()}


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


def document(path: str | Path) -> Any:
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
        fields = document(text)
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
    if (world := loco.worlds.world_of(pipe)) is not None:
        return world.concept(kind, name, prompts)
    makers = {"style": loco.concepts.style, "object": loco.concepts.object}
    if kind not in makers:
        raise ValueError(
            f"concept {text!r}: outside of Shapeland only style:NAME and object:NAME have prompts "
            "of their own; name a JSON or YAML file with name, kind, prompts and neutral"
        )
    return makers[kind](name)


def on_shapeland(pipe: Any) -> bool:
    """Whether `pipe` is a mini."""
    return loco.worlds.world_of(pipe) is not None


def planted(pipe: Any, kind: str) -> list[int] | None:
    """The layers in which attributes of this kind were planted, if they were."""
    world = loco.worlds.world_of(pipe)
    return None if world is None or kind not in world.truth else list(world.truth[kind])


def located(pipe: Any, layers: str | None, window_from: str | None) -> tuple[Any, Any]:
    """(layers, concept) as they are named, or those of the localization saved in `window_from`.

    What is not named is None. Refuses the localization of another model, and one without layers.
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
    if not found.layers:
        best, test = ",".join(map(str, found.best)), found.test
        raise ValueError(
            f"{window_from} found no layers of {found.concept.name!r} (verdict {test.verdict!r}, "
            f"p = {float(test.p[test.best]):.2g}): name them yourself; its best window is "
            f"--layers {best}"
        )
    return list(found.layers), found.concept


def load_edit(path: str) -> Any:
    """The edit in a result folder, or in a file."""
    return loco.Edit.load(Path(path) / "edit.safetensors" if os.path.isdir(path) else path)


def load_clip(pipe: Any, name: str | None) -> Any:
    """The CLIP called `name`, or the one that a mini brings."""
    if name is not None:
        return loco.judging.load_clip(name, pipe.device)
    try:
        return loco.judging.clip_for(pipe)
    except ValueError:
        raise ValueError(
            f"no CLIP comes with {loco.records.model_name(pipe)}: name one, for example "
            "--clip openai/clip-vit-large-patch14"
        ) from None
