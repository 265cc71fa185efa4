"""What starting costs: `loco --help`, and the library beside what it stands on.

    python benchmarks/startup.py --record results/startup.json

Two figures, each with its bar, medians of fresh processes: the seconds of `loco --help` from start
to end (at most 1.0), and, within one process, the time of `import torch, diffusers` and then
`import loco_core` over that of the first alone (at most 1.3). A third has no bar: the same ratio
when every public name of the library is fetched, too.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import arguments, finish

ROOT = Path(__file__).parents[1]
HELP_BAR, IMPORT_BAR = 1.0, 1.3
HELP = "import sys; from loco_core.cli import main; sys.exit(main(['--help']))"
IMPORTS = """
import time
start = time.perf_counter()
import torch, diffusers
diffusers.DiffusionPipeline
base = time.perf_counter()
import loco_core
alone = time.perf_counter()
[getattr(loco_core, name) for name in loco_core.__all__]
every = time.perf_counter()
print(base - start, alone - start, every - start)
"""


def run(code: str) -> str:
    """The output of `code` in a fresh process."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def measure(repeats: int) -> dict[str, object]:
    """The figures, after one run of each that warms the disk."""
    run(HELP), run(IMPORTS)
    seconds, alone, every = [], [], []
    for _ in range(repeats):
        start = time.perf_counter()
        run(HELP)
        seconds.append(time.perf_counter() - start)
        base, with_loco, with_names = map(float, run(IMPORTS).split())
        alone.append(with_loco / base)
        every.append(with_names / base)
    help_seconds, ratio = statistics.median(seconds), statistics.median(alone)
    return {
        "help_seconds": help_seconds,
        "help_bar": HELP_BAR,
        "import_ratio": ratio,
        "import_bar": IMPORT_BAR,
        "every_name_ratio": statistics.median(every),
        "passed": help_seconds <= HELP_BAR and ratio <= IMPORT_BAR,
    }


def main() -> int:
    """Measure, print, and return 0 if both bars are held."""
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    found = measure(args.repeats)
    text = (
        f"loco --help                 {found['help_seconds']:.2f} s  (bar {HELP_BAR})\n"
        f"import loco_core on top     {found['import_ratio']:.3f}  (bar {IMPORT_BAR})\n"
        f"and every public name       {found['every_name_ratio']:.3f}"
    )
    return finish(args, found, n={"repeats": args.repeats}, text=text)


if __name__ == "__main__":
    sys.exit(main())
