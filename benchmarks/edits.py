"""What it costs to put an edit on and take it off.

    python benchmarks/edits.py --record results/edits.json

1. 140 weights of SD-XL's shapes and a map of 48 rows: `apply`, `revert` by the same edit and by a
   copy of it that was loaded from its file (at most 3 times `apply`), on two pipelines in turn.
2. A knock-out of 0.1 % of 42 million entries: memory held while it is applied, beyond the pipeline
   and the edit (at most 2 MiB).
"""

import gc
import sys
import tempfile
from pathlib import Path

import torch
from common import arguments, finish, in_turn
from torch import nn

import loco_core as loco
from loco_core.edits import LowRankMap, stack
from loco_core.edits.edit import Edit
from loco_core.edits.knockout import Knockout
from loco_core.edits.weights import fingerprint
from loco_core.records import Provenance

WIDTH, ROWS, MIB = 2048, 48, 2**20
OUT = [640] * 20 + [1280] * 120  # to_k and to_v of SD-XL's 70 text layers


def put_on_and_off(repeats: int) -> dict:
    """Seconds of `apply` and `revert`, without the search for modules in a pipeline."""
    torch.manual_seed(0)
    modules = {f"unet.{i}.weight": nn.Linear(WIDTH, out, bias=False) for i, out in enumerate(OUT)}
    D, R = torch.randn(WIDTH, ROWS).double() * 1e-3, torch.randn(ROWS, WIDTH).double()
    originals = {name: fingerprint(module.weight) for name, module in modules.items()}
    made = Provenance("stub", None, "", {"method": "stub"})
    edit = Edit(dict.fromkeys(modules, LowRankMap(D, R)), originals, made)
    with tempfile.TemporaryDirectory() as folder:
        edit.save(Path(folder) / "edit")
        loaded = Edit.load(Path(folder) / "edit")

    def apply() -> None:
        edit.check_made_for(loco, {name: m.weight for name, m in modules.items()}, "")
        stack.put_on(modules, edit.changes, edit)

    ways = {
        "apply": apply,
        "revert": lambda: stack.take_off(modules, edit),
        "apply again": apply,
        "revert by a loaded copy": lambda: stack.take_off(modules, loaded),
    }
    seconds = in_turn(ways, repeats)
    ratio = seconds["revert by a loaded copy"] / seconds["apply"]
    return {"seconds": {k: round(s, 3) for k, s in seconds.items()}, "revert_to_apply": ratio}


def held_by_a_knockout() -> dict:
    """What a knock-out of 0.1 % of 42 million entries holds while it is on, beside the edit."""
    shapes = [(10240, 1280), (1280, 5120)] * 2 + [(2560, 1280)] * 1
    modules = {f"unet.{i}.weight": nn.Linear(s[1], s[0], bias=False) for i, s in enumerate(shapes)}
    total = sum(module.weight.numel() for module in modules.values())
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for name, module in modules.items():
        count = module.weight.numel() // 1000
        at = torch.randperm(module.weight.numel(), generator=generator)[:count].sort().values
        changes[name] = Knockout(tuple(module.weight.shape), at)
    originals = {name: fingerprint(module.weight) for name, module in modules.items()}
    edit = Edit(changes, originals, Provenance("stub", None, "", {"method": "stub"}))
    before = _tensors_held()
    stack.put_on(modules, edit.changes, edit)
    held = _tensors_held() - before
    stack.take_off(modules, edit)
    return {"entries": total, "held_mib": held / MIB}


def _tensors_held() -> int:
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def main() -> int:
    """Measure, print, and return 0 if the bars are held."""
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way")
    args = parser.parse_args()
    turns, knockout = put_on_and_off(args.repeats), held_by_a_knockout()
    passed = turns["revert_to_apply"] <= 3 and knockout["held_mib"] <= 2
    result = {"low_rank": turns, "knockout": knockout, "passed": passed}
    return finish(args, result, n={"weights": len(OUT), "repeats": args.repeats})


if __name__ == "__main__":
    sys.exit(main())
