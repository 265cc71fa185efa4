"""`python -m loco_core.worlds.training mini-sd [--device cuda] [--resume]`"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..shapeland.planting import CHECKPOINTS, PLANTS
from .data import COUNT
from .judge import train_judge
from .recipe import train_mini

CACHE = Path(".cache/shapeland")


def main(
    model: Annotated[str, typer.Argument(help=f"one of {', '.join(PLANTS)}; or judge")],
    device: Annotated[str, typer.Option(help="cpu, or a GPU such as cuda")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="go on from a killed run")] = False,
    steps: Annotated[int | None, typer.Option(help="of the denoiser; default: the recipe")] = None,
    count: Annotated[int, typer.Option(help="drawings to train on")] = COUNT,
    captions: Annotated[int, typer.Option(help="held-out captions to measure on")] = 200,
    folder: Annotated[Path, typer.Option(help="for drawings and states")] = CACHE,
    out: Annotated[Path, typer.Option(help="where the mini's folder is written")] = CHECKPOINTS,
) -> None:
    """Train a mini on Shapeland, with everything that it needs and that is not there yet:
    drawings, judge, autoencoder, CLIP. All cores are used; on a GPU it takes minutes."""
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter(f"device {device!r}: this machine has no GPU; leave out --device")
    if model == "judge":
        train_judge(folder, device)
    elif model in PLANTS:
        train_mini(
            model,
            folder,
            out=out,
            device=device,
            resume=resume,
            steps=steps,
            count=count,
            captions=captions,
        )
    else:
        raise typer.BadParameter(f"no mini is called {model!r}; choose from {', '.join(PLANTS)}")


if __name__ == "__main__":
    typer.run(main)
