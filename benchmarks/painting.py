"""What a sweep holds and what `paint` costs beside the pipeline itself. [--json] [--record PATH]

- memory: 68 pictures of 1024 pixels (LocoGen: 15 windows and two ends, 4 prompts) of a pipeline
  whose network is a stub. Peak of the sweep above the peak of painting one batch, from the kernel's
  high-water mark (Linux only), and the bytes of its store.
- overhead: `paint` against calling the pipeline itself with the same rows in one batch, on mini-sd,
  timed in turn in one process.

Bars: memory <= 0.3 GB, store <= 0.25 GB, overhead <= 3 %. The exit status is 0 only if all hold.
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import arguments, finish, in_turn

import loco_core as loco
from loco_core.families import family_of
from loco_core.families.latent import own_scheduler
from loco_core.painting import Picture, Sampling, Store, paint
from loco_core.painting.batch import paint_batch

SIDE, BATCH = 1024, 16
BARS = {"memory_gb": 0.3, "store_gb": 0.25, "overhead": 0.03}


def stub() -> Any:
    """mini-sd whose call gives smooth pictures of 1024 pixels at once, without its network."""
    pipe = loco.load("mini-sd")

    class Stub(type(pipe)):  # type: ignore[misc]
        def __call__(self, generator: list[torch.Generator], **_: Any) -> Any:
            coarse = torch.stack([torch.rand(3, 64, 64, generator=g) for g in generator])
            images = torch.nn.functional.interpolate(coarse, SIDE, mode="bilinear")
            noise = torch.stack([torch.rand(3, SIDE, SIDE, generator=g) for g in generator])
            return SimpleNamespace(images=images.mul(0.9).add_(noise, alpha=0.1))

    pipe.__class__ = Stub
    return pipe


def peak(reset: bool = False) -> int:
    """Most bytes that were resident since the last reset; reset: begin anew after reading."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) * 1024


def memory() -> dict[str, float]:
    """GB of the sweep above one batch, and of its store."""
    pipe = stub()
    concept = loco.shapeland.concept("style", "Mira Holt", prompts=4)
    batch = [Picture(prompt, seed) for prompt in concept.prompts for seed in range(4)]
    paint_batch(family_of(pipe), batch, Sampling(steps=1))
    peak(reset=True)
    paint_batch(family_of(pipe), batch, Sampling(steps=1))
    one = peak(reset=True)
    with tempfile.TemporaryDirectory() as folder:
        found = loco.localize(
            pipe, concept, seeds=[0], steps=1, batch_size=BATCH, folder=folder,
            score=lambda images, texts: images.mean((1, 2, 3)),
        )  # fmt: skip
        whole = peak()
        entries = list(Store(Path(folder)).entries())
        assert found.sheet.shape == (17, 4, 1, 1, 3, SIDE, SIDE) and len(entries) == 68
        size = sum(entry.bytes for entry in entries)
    return {"memory_gb": (whole - one) / 1e9, "store_gb": size / 1e9, "one_batch_gb": one / 1e9}


def overhead(repeats: int, steps: int) -> dict[str, float]:
    """`paint` against the pipeline's own call, as a share of its time."""
    pipe = loco.load("mini-sd")
    pictures = [Picture("a red star by Mira Holt", seed) for seed in range(BATCH)]

    def by_itself() -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in range(BATCH)]
        with own_scheduler(pipe), torch.no_grad():
            pipe(
                ["a red star by Mira Holt"] * BATCH, negative_prompt=[""] * BATCH,
                generator=generators, num_inference_steps=steps, output_type="pt",
            )  # fmt: skip

    def painted() -> None:
        list(paint(pipe, pictures, Sampling(steps), batch_size=BATCH))

    def kept() -> None:
        with tempfile.TemporaryDirectory() as folder:
            list(paint(pipe, pictures, Sampling(steps), batch_size=BATCH, store=folder))

    seconds = in_turn({"pipeline": by_itself, "paint": painted, "with a store": kept}, repeats)
    return {
        "overhead": seconds["paint"] / seconds["pipeline"] - 1,
        "overhead_with_store": seconds["with a store"] / seconds["pipeline"] - 1,
        "seconds": seconds["pipeline"],
    }


def main() -> int:
    """Measure, print, and return 0 if all bars are held."""
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loco.progress(False)
    result: dict[str, Any] = memory() | overhead(args.repeats, args.steps)
    result = {name: round(value, 4) for name, value in result.items()}
    result["passed"] = all(result[name] <= bar for name, bar in BARS.items())
    return finish(args, result, n={"pictures": 68, "repeats": args.repeats})


if __name__ == "__main__":
    sys.exit(main())
