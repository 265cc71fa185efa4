"""Types and shapes hold: mypy and ruff are clean, and a wrong shape is caught where it is made."""

import subprocess
import sys
from pathlib import Path

import pytest
import shapes
import torch
from jaxtyping import Float
from torch import Tensor

from loco_core.closed_form import solver as closed_form
from loco_core.families import TextStates
from loco_core.interventions import routing

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command", ["mypy", "ruff check", "ruff format --check"], ids=lambda command: command
)
def test_the_code_is_clean(command):
    result = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def pairwise(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Refuses rows that do not pair; sums over the wrong axis if there are as many as columns."""
    if a.shape != b.shape:
        raise ValueError("a and b must pair row by row")
    return (a * b).sum(0)


def test_a_wrong_shape_inside_is_caught():
    right = torch.ones(2, 2)
    assert shapes.checked(pairwise)(right, right).shape == (2,)
    with pytest.raises(
        shapes.ShapeError, match=r"return is torch.float32 \[3\], not Float\[Tensor, 'n'\]"
    ):
        shapes.checked(pairwise)(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(shapes.ShapeError, match="a is torch.int64"):
        shapes.checked(pairwise)(*torch.ones(2, 2, 2, dtype=torch.long))


def test_what_a_user_gets_wrong_is_refused_in_the_words_of_the_library():
    with pytest.raises(ValueError, match="must pair row by row"):
        shapes.checked(pairwise)(torch.ones(2, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="keys and targets must pair row by row"):
        closed_form.fit(torch.ones(2, 4), torch.ones(3, 4), lam=0.1)
    with pytest.raises(ValueError, match="a source map is"):
        routing.checked_map(torch.zeros(3), layers=3, texts=1)


def test_the_kernels_are_checked_here_though_they_are_annotated_only(monkeypatch):
    with monkeypatch.context() as broken, pytest.raises(shapes.ShapeError, match="inverse: return"):
        broken.setattr(torch, "cholesky_solve", lambda A, factor: A.T)
        closed_form.fit(torch.eye(4)[:2], torch.ones(2, 4), lam=0.1)
    with pytest.raises(shapes.ShapeError, match="tokens"):
        TextStates(torch.ones(2, 5, 3), torch.ones(2, 4, dtype=torch.long))


def test_users_pay_nothing_for_the_shapes():
    code = (
        "import inspect, sys, loco_core.interventions.routing as routing\n"
        "assert inspect.unwrap(routing.windows) is routing.windows and 'shapes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
