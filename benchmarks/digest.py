"""What it costs to tell one set of weights from another, on one thread.

    python benchmarks/digest.py --record results/digest.json

67 million float32 weights, the least of three runs each: `records.digest`, rounded and exact (at
most 0.25 s), beside the fingerprint of 0.3, which summed the bits and so was blind to their order;
and the memory that a digest takes on top of the weights.
"""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable

import torch
from common import arguments, finish
from torch import nn

from loco_core import records

BAR, LAYERS, WIDTH = 0.25, 16, 2048


@torch.no_grad()
def summed(module: nn.Module) -> str:
    """The fingerprint of 0.3."""
    sums = {
        name: (list(x.shape), x.detach().to(torch.float16).view(torch.int16).sum(dtype=torch.int64))
        for name, x in module.state_dict().items()
        if x.is_floating_point()
    }
    text = json.dumps([[name, shape, int(total)] for name, (shape, total) in sorted(sums.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def seconds(measured: Callable[[], object], repeats: int) -> float:
    """The least time of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        measured()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(repeats: int) -> dict:
    """All figures, and whether the bar is held."""
    torch.set_num_threads(1)
    network = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rounded = seconds(lambda: records.digest(network), repeats)
    exact = seconds(lambda: records.digest(network, exact=True), repeats)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "weights": sum(weight.numel() for weight in network.parameters()),
        "rounded_s": round(rounded, 3),
        "exact_s": round(exact, 3),
        "fingerprint_of_0.3_s": round(seconds(lambda: summed(network), repeats), 3),
        "added_memory_MB": round(added / 1024, 1),
        "bar_s": BAR,
        "passed": max(rounded, exact) <= BAR,
    }


def main() -> int:
    """Measure, print, and return 0 if the bar is held."""
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each")
    args = parser.parse_args()
    result = measure(args.repeats)
    text = "\n".join(f"{name:>22}: {value}" for name, value in result.items())
    return finish(args, result, n={"repeats": args.repeats}, text=text)


if __name__ == "__main__":
    sys.exit(main())
