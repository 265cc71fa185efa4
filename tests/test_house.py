"""The house stands: arrows run downwards, none in a circle, none hidden, and rooms are small."""

import shutil
from pathlib import Path

import pytest

from tools.house import LONGEST, ORDER, PACKAGE, ROOT, House

HOUSE = House()


@pytest.mark.parametrize("rule", ["strangers", "upward", "circles", "hidden", "long"])
def test_the_house_is_in_order(rule):
    assert getattr(HOUSE, rule)() == []


def test_every_wing_has_its_place_in_the_order_once():
    folder = ROOT / PACKAGE
    rooms = {p.stem for p in folder.glob("*.py")} - {"__init__"}
    wings = {p.parent.name for p in folder.glob("*/__init__.py")}
    assert sorted(ORDER) == sorted([*rooms, *wings, ""])


def test_arrows_are_found_however_an_import_is_written(copy):
    (copy / "loco_core" / "display" / "live" / "seen.py").write_text(
        "import loco_core.zoo as zoo\nfrom loco_core import files\nfrom ... import records\n"
        "from ..plots import CURVE\nfrom . import jobs\nfrom ...painting import Store, paint\n"
        "import torch\nfrom os import path\n"
    )
    arrows = [arrow.target for arrow in House(copy).arrows if arrow.source == "display.live.seen"]
    expected = ["zoo", "files", "records", "display.plots", "display.live.jobs"]
    assert arrows == [*expected, "painting", "painting.paint"]


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the library's source."""
    ignore = shutil.ignore_patterns("__pycache__", "checkpoints")
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=ignore)
    return tmp_path


BREACHES = {
    "up": ("painting/paint.py", "upward", "from ..display import explore\n"),
    "up to the roof": ("painting/paint.py", "upward", "import loco_core as loco\n"),
    "apart": ("edits/edit.py", "upward", "from ..localization import localize\n"),
    "circle": ("records.py", "circles", "from . import zoo\n"),
    "circle of three": ("families/base.py", "circles", "from . import family_of\n"),
    "in a function": ("display/plots.py", "hidden", "def f():\n    from .. import records\n"),
    "in a method": (
        "display/plots.py", "hidden", "class A:\n    def f(self):\n        import loco_core.zoo\n",
    ),
    "under a condition": (
        "display/plots.py", "hidden", "if TYPE_CHECKING:\n    from ..zoo import load\n",
    ),
    "by a function": (
        "display/plots.py", "hidden", "def f():\n    importlib.import_module('loco_core.zoo')\n",
    ),
    "by a function, relative": (
        "display/plots.py", "hidden", "f = lambda: import_module('..zoo', __package__)\n",
    ),
    "long": ("display/plots.py", "long", "x = 1\n" * (LONGEST + 1)),
    "stranger": ("attic.py", "strangers", "x = 1\n"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "rule", "code"), BREACHES.values(), ids=BREACHES)
def test_a_breach_is_found_and_told(copy, file, rule, code):
    path = copy / PACKAGE / file
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}\n\n{code}")
    module = f"{PACKAGE}.{file.removesuffix('.py').replace('/', '.')}"
    new = set(getattr(House(copy), rule)()) - set(getattr(HOUSE, rule)())
    assert new and all(module in line for line in new)


def test_an_import_of_another_library_may_stand_in_a_function(copy):
    with (copy / PACKAGE / "display" / "plots.py").open("a") as file:
        file.write("\n\ndef f():\n    import pandas\n    importlib.import_module('diffusers')\n")
    assert House(copy).hidden() == HOUSE.hidden()


def test_the_table_names_each_wing_once_and_only_wings_below_it():
    _, _, *rows = HOUSE.table().splitlines()
    seen = []
    for row in rows:
        _, wing, below, _ = (cell.strip() for cell in row.split("|"))
        assert set(filter(None, below.split(", "))) <= {*seen, f"`{PACKAGE}`"}
        seen.append(wing)
    assert len(seen) == len(ORDER) - 1
