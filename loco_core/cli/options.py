"""What can be asked on the command line: options that several commands share; `read` reads them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

import loco_core as loco

from . import read


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
Variant = Annotated[str | None, Option(help="Of the weights' files, such as fp16.")]
Revision = Annotated[str | None, Option(help="Of a Hub id: a branch, tag or commit.")]
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
AsPublished = Annotated[
    bool, Option("--as-published", help="The paper's setting, where no option says otherwise.")
]
Prompts = Annotated[int, Option(help="How many prompts, for a concept of Shapeland.", min=1)]
Seeds = Annotated[str, Option(help="Numbers and ranges: 0,2 or 0-3.")]
Steps = Annotated[int, Option(help="Of sampling.")]
Guidance = Annotated[float, Option(help="Scale of classifier-free guidance.")]
Batch = Annotated[
    Any,
    Option(parser=read.batch, metavar="N|fit", help="Images at a time, or what the memory holds."),
]
Height = Annotated[int | None, Option(help="Pixels; by default the model's own.")]
Width = Annotated[int | None, Option(help="Pixels; with --height.")]
Engine = Annotated[
    str | None,
    Option(help="Who paints: local:2, local:gpus, tcp://HOST:PORT or a Dask scheduler's file."),
]
ClipName = Annotated[
    str | None, Option("--clip", help="CLIP that scores: a folder or Hub id; a mini brings one.")
]
