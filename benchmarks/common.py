"""What benchmarks share: their arguments, what a record holds, and times that may be compared.

    def main() -> int:
        args = arguments(__doc__).parse_args()
        return finish(args, measure(), n={"worlds": 2000}, text=table)

`--json` prints one object, `--record results/NAME.json` writes it: the figures, and with them the
command, the commit, the machine, the versions and n, so that whoever reads a number can ask for it
again. Seconds of two machines do not compare, nor do those of two runs on a busy one: what a record
says about speed is a ratio of two ways timed in turn in one process (`in_turn`).
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from loco_core import records
from loco_core.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with --json and --record; the first line of `doc` is its description."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--record", type=Path, metavar="PATH", help="write it there, as results/NAME.json"
    )
    return parser


def finish(
    args: argparse.Namespace, result: Mapping[str, Any], *, n: Mapping[str, int], text: str = ""
) -> int:
    """Print and record what was measured: 0 if result["passed"], else 1, the exit status.

    n: how many of what the figures rest on. text: printed where no JSON is asked for.
    """
    found = {**circumstances(), "n": dict(n), **result}
    if args.record:
        atomic_write(args.record, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found, indent=1) if args.json else text or json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


def circumstances() -> dict[str, Any]:
    """command, commit (None without git), whether the code differs from it, machine, versions."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "loco_core", "benchmarks")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return {
        "command": shlex.join(["python", name, *sys.argv[1:]]),
        "commit": commit,
        "changed": bool(changed) if commit else None,
        "machine": {
            "processor": f"{platform.machine()}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(),
            "gpu": gpu,
            "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        },
        "versions": {"python": platform.python_version(), **records.versions()},
    }


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked of a benchmark, without how it is told."""
    return {name: value for name, value in vars(args).items() if name not in ("json", "record")}


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Time of one call on the wall and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def with_peak(call: Callable[[], object]) -> tuple[tuple[float, float], float | None]:
    """Both times of one call, and the MiB by which the resident set grew at its highest.

    None where the kernel does not tell the high-water mark (it is Linux that does).
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or the call finds memory that others have freed
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        return seconds(call), None
    took = seconds(call)
    return took, round(max(_resident("VmHWM") - before, 0) / 1024, 1)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0])


def in_turn(ways: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """The least seconds of each of some ways to do one thing, timed in turn, after a turn untimed.

    A pause of the machine then falls on all of them alike, and their ratios stand.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: min(seconds) for name, seconds in times.items()}


def _git(*words: str) -> str | None:
    """What git says of this folder, None without it."""
    try:
        ran = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None
