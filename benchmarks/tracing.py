"""How much faster a batched causal trace is than the plain one, and whether they agree.

    python benchmarks/tracing.py [--json] [--model mini-sd]

Plain, in the UNet: for every site a clean run that keeps the site's activations, then the restored
run, one image at a time. Cached: one clean run keeps those of all sites (memory grows with sites
and steps); what is gained on it is the gain of larger batches. Plain, in the text encoder: an image
for every layer, part and token, one at a time; no clean image is needed there.

Bars: at least 2 times fewer seconds than the plain way, and images no more than 1e-4 (float32)
apart beyond the rounding to 8 bits of a trace's images.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import loco_core as loco  # noqa: E402
from benchmarks.routing import seconds  # noqa: E402
from loco_core._progress import bar
from loco_core.families import family_of
from loco_core.interventions.patching import rewriting
from loco_core.localization import runs
from loco_core.localization.sites import module_of, text_sites, unet_sites
from loco_core.painting import paint as sampling
from loco_core.records import model_name, versions

RATIO_BAR, DIFFERENCE_BAR = 2.0, 1e-4


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A score that takes no time."""
    return images.mean((1, 2, 3))


def image(pipe, text, steps: int) -> Tensor:
    """One image, in a batch of its own."""
    model = family_of(pipe)
    negative = model.unprompted(model.encode([""]))
    with sampling.own_scheduler(pipe), bar(1, "") as progress:
        return sampling.sample_batch(
            pipe, text, text, negative, [0], None, steps, 7.5, 0.0, progress
        )[0]


def kept_and_put(module: nn.Module, kept: dict[nn.Module, list[Tensor]]):
    """(a rewrite that keeps conditional outputs of `module`, one that puts them back)."""

    def keep(x: Tensor) -> Tensor:
        kept.setdefault(module, []).append(x[1:].clone())
        return x

    def put(x: Tensor) -> Tensor:
        put.step += 1
        return torch.cat([x[:1], kept[module][put.step]])

    put.step = -1
    return keep, put


def plain_unet(pipe, clean, corrupted, modules: list[nn.Module], steps: int, cached: bool):
    """Images of the clean, the corrupted and each restored run, one after the other."""
    kept: dict[nn.Module, list[Tensor]] = {}
    pairs = {module: kept_and_put(module, kept) for module in modules}
    if cached:
        with rewriting({module: keep for module, (keep, _) in pairs.items()}):
            images = [image(pipe, clean, steps), None]
    else:
        images = [image(pipe, clean, steps), None]
    images[1] = image(pipe, corrupted, steps)
    for module, (keep, put) in pairs.items():
        if not cached:
            kept.clear()
            with rewriting({module: keep}):
                image(pipe, clean, steps)
        with rewriting({module: put}):
            images.append(image(pipe, corrupted, steps))
    return torch.stack(images)


def plain_text(pipe, prompt: str, noised, sites, steps: int) -> Tensor:
    """The same for the text encoder: each site's text is encoded, and its image made, alone."""
    images = []
    for site in sites:
        texts = runs._encode(pipe, prompt, noised, [(site,)], [(1, 0), (2, 0)], 8)
        images += [image(pipe, texts[i : i + 1], steps) for i in ((2,) if images else (0, 1, 2))]
    return torch.stack(images)


@torch.no_grad()
def measure(model: str, style: str, steps: int, batch_size: int, repeats: int, device: str | None):
    """All figures, and whether the bars are held."""
    pipe = loco.load(model, device=device)
    concept = loco.shapeland.concept("style", style, prompts=1)
    (noised,) = runs.corruptions(pipe, concept, None, 1)[1]
    texts = runs._encode(pipe, concept.prompts[0], noised, (), [(1, 0)], 2)
    inner, outer = unet_sites(pipe), text_sites(pipe, concept.prompts, concept.name, "all")
    modules = [module_of(pipe, site) for site in inner]
    run = dict(seeds=[0], steps=steps, batch_size=batch_size, score=brightness, images=True)
    unet = partial(plain_unet, pipe, texts[:1], texts[1:], modules, steps)
    ways = {
        "unet": {
            "batched": lambda: loco.trace(pipe, concept, **run).images[:, 0, 0, 0],
            "plain": lambda: unet(cached=False),
            "cached": lambda: unet(cached=True),
        },
        "text_encoder": {
            "batched": lambda: loco.trace(
                pipe, concept, "text_encoder", tokens="all", **run
            ).images[:, 0, 0, 0],
            "plain": lambda: plain_text(pipe, concept.prompts[0], noised, outer, steps),
        },
    }
    image(pipe, texts[:1], steps)  # has run once before the clock starts
    found, made = {}, {}
    for where, calls in ways.items():
        took = {
            name: min(
                seconds(lambda n=name, c=call: made.__setitem__(n, c()), pipe.device)
                for _ in range(repeats)
            )
            for name, call in calls.items()
        }
        apart = [(made["batched"] - made[name]).abs().max() for name in calls]
        found[where] = {
            "sites": len(inner if where == "unet" else outer),
            "seconds": took,
            "ratio": {name: took[name] / took["batched"] for name in calls if name != "batched"},
            "max_abs_difference": max(0.0, float(max(apart)) - 0.5 / 255),
        }
    return {
        "model": model_name(pipe),
        "steps": steps,
        "batch_size": batch_size,
        "device": str(pipe.device),
        "threads": torch.get_num_threads(),
        **found,
        "ratio_bar": RATIO_BAR,
        "difference_bar": DIFFERENCE_BAR,
        "passed": all(
            each["ratio"]["plain"] >= RATIO_BAR and each["max_abs_difference"] <= DIFFERENCE_BAR
            for each in found.values()
        ),
        "versions": versions(),
    }


def main() -> int:
    """Measure, print, and return 0 if both bars are held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini-sd", help="a mini")
    parser.add_argument("--style", default="Mira Dunn", help="the style that is traced")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    loco.progress(False)
    found = measure(args.model, args.style, args.steps, args.batch_size, args.repeats, args.device)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for where in ("unet", "text_encoder"):
            each = found[where]
            print(f"{where}: {each['sites']} sites, {found['steps']} steps, {found['device']}")
            for name, took in each["seconds"].items():
                print(f"  {name:8} {took:6.1f} s  ratio {each['ratio'].get(name, 1):.2f}")
            print(f"  beyond 8 bits apart {each['max_abs_difference']:.1e}")
        print(f"bars: ratio of plain >= {RATIO_BAR}, apart <= {DIFFERENCE_BAR:.0e}")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
