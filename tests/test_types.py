"""Types and shapes hold: mypy and ruff are clean, and a wrong shape is caught where it is made."""

import inspect
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import shapes
import torch
from jaxtyping import Float
from torch import Tensor

import loco_core as loco
from loco_core.closed_form import solver as closed_form
from loco_core.families import TextStates
from loco_core.interventions import routing
from tools import stub

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command", ["mypy", "ruff check", "ruff format --check"], ids=lambda command: command
)
def test_the_code_is_clean(command):
    result = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_stub_is_what_the_tables_of_names_say():
    assert (ROOT / stub.STUB).read_text() == stub.stub()


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> Path:
    """A folder of a user's, in whose environment the library is installed, without torch."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder / "venv", with_pip=False)
    ignore = shutil.ignore_patterns("__pycache__", "checkpoints")
    shutil.copytree(ROOT / "loco_core", site(folder) / "loco_core", ignore=ignore)
    return folder


def site(folder: Path) -> Path:
    """Where packages are installed."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.check_output([folder / "venv" / "bin" / "python", "-c", code], text=True)
    return Path(found.strip())


def told(user: Path, *lines: str) -> list[str]:
    """What mypy says of a user's file, with no setting of ours."""
    (user / "mine.py").write_text("\n".join(["import loco_core as loco", *lines]))
    command = [sys.executable, "-m", "mypy", "--python-executable", "venv/bin/python", "mine.py"]
    return subprocess.run(command, cwd=user, capture_output=True, text=True).stdout.splitlines()


def revealed(user: Path, names: list[str]) -> dict[str, str]:
    """Name under `loco` -> its type."""
    *lines, last = told(user, *(f"reveal_type(loco.{name})" for name in names))
    assert last.startswith("Success"), lines
    return dict(zip(names, (x.split('type is "')[1].rstrip('"') for x in lines), strict=True))


def test_a_user_is_told_the_signature_of_localize_and_of_a_class(user):
    types = revealed(user, ["localize", "Concept", "shapeland.concept", "__version__"])
    assert types["localize"].startswith("def (pipe: Any, concept: loco_core.concepts.Concept")
    assert types["localize"].endswith("-> loco_core.localization.localization.Localization")
    assert types["Concept"].startswith("def (name: str, kind: str, prompts:")
    assert types["shapeland.concept"].endswith("-> loco_core.concepts.Concept")
    assert types["__version__"] == "str"


@pytest.mark.parametrize(
    "code, error",
    [
        ("loco.locolize", 'Module has no attribute "locolize"'),
        ("loco.shapeland.concpet", 'has no attribute "concpet"'),
        ("loco.localize(0, 'star')", 'has incompatible type "str"; expected "Concept"'),
        ("loco.generate(0, ['a star'], stpes=2)", 'Unexpected keyword argument "stpes"'),
        ("loco.Concept('star')", "Missing positional arguments"),
    ],
)
def test_a_users_slip_is_refused_before_anything_runs(user, code, error):
    first, *_ = told(user, code)
    assert "mine.py:2: error:" in first and error in first


@pytest.mark.slow  # it reads all of torch
def test_a_user_with_torch_is_told_the_type_of_every_name(user):
    libraries = Path(torch.__file__).parents[1]
    (site(user) / "libraries.pth").write_text(str(libraries))
    types = revealed(user, sorted(loco.__all__))
    modules = {name for name in types if inspect.ismodule(getattr(loco, name))}
    assert {name for name, found in types.items() if found == "types.ModuleType"} == modules
    assert {n for n, found in types.items() if found.startswith("def ")} == {*types} - modules


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
