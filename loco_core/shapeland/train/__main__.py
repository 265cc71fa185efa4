"""`python -m loco_core.shapeland.train mini-sd [--device cuda] [--resume]`"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..planting import PLANTS
from .judge import train_judge
from .recipe import train_mini


def main(
    model: Annotated[str, typer.Argument(help=f"one of {', '.join(PLANTS)}; or judge")],
    device: Annotated[str, typer.Option(help="cpu, or a GPU such as cuda")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="go on from a killed run")] = False,
    steps: Annotated[int | None, typer.Option(help="of the denoiser; default: the recipe")] = None,
    folder: Annotated[Path, typer.Option(help="where drawings and states are kept")] = Path(
        ".cache/shapeland"
    ),
) -> None:
    """Train a mini on Shapeland, with everything that it needs and that is not there yet:
    drawings, judge, autoencoder, CLIP. All cores are used; on a GPU it takes minutes."""
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter(f"device {device!r}: this machine has no GPU; leave out --device")
    if model == "judge":
        train_judge(folder, device)
    elif model in PLANTS:
        train_mini(model, folder, device=device, resume=resume, steps=steps)
    else:
        raise typer.BadParameter(f"no mini is called {model!r}; choose from {', '.join(PLANTS)}")


if __name__ == "__main__":
    typer.run(main)
