"""How much faster a batched causal trace is than the plain one, and whether they agree.

    python benchmarks/tracing.py [--json] [--record results/tracing.json] [--model mini-sd]

Plain, in the denoiser: for every site a clean run that keeps the site's activations, then the
restored run, one image at a time. Cached: one clean run keeps those of all sites (memory grows with
sites and steps); what is gained on it is the gain of larger batches. Plain, in the text encoder: an
image for every layer, part and token, one at a time; no clean image is needed there.

Bars: at least 2 times fewer seconds than the plain way, and images no more than 1e-4 (float32)
apart beyond the rounding to 8 bits of a trace's images.
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from common import arguments, finish
from routing import seconds
from torch import Tensor, nn

import loco_core as loco
from loco_core.families import Model, Site, TextStates, family_of
from loco_core.interventions.patching import Rewrite, rewriting
from loco_core.localization.corruption import corruptions
from loco_core.painting import Noise, Picture, Sampling
from loco_core.painting.texts import Reader, own
from loco_core.records import model_name

RATIO_BAR, DIFFERENCE_BAR = 2.0, 1e-4


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A score that takes no time."""
    return images.mean((1, 2, 3))


def image(model: Model, text: TextStates, negative: TextStates, steps: int) -> Tensor:
    """One image, in a batch of its own."""
    return model.call(text, negative, [0], steps=steps, guidance=7.5)[0]


def kept_and_put(module: nn.Module, kept: dict[nn.Module, list[Tensor]]) -> tuple[Rewrite, Rewrite]:
    """(a rewrite that keeps conditional outputs of `module`, one that puts them back)."""

    def keep(x: Tensor) -> Tensor:
        kept.setdefault(module, []).append(x[1:].clone())
        return x

    step = count()

    def put(x: Tensor) -> Tensor:
        return torch.cat([x[:1], kept[module][next(step)]])

    return keep, put


def plain_denoiser(
    paint: Callable[[TextStates], Tensor],
    clean: TextStates,
    corrupted: TextStates,
    modules: list[nn.Module],
    cached: bool,
) -> Tensor:
    """Images of the clean, the corrupted and each restored run, one after the other."""
    kept: dict[nn.Module, list[Tensor]] = {}
    pairs = {module: kept_and_put(module, kept) for module in modules}
    with rewriting({module: keep for module, (keep, _) in pairs.items()} if cached else {}):
        images = [paint(clean)]
    images.append(paint(corrupted))
    for module, (keep, put) in pairs.items():
        if not cached:
            kept.clear()
            with rewriting({module: keep}):
                paint(clean)
        with rewriting({module: put}):
            images.append(paint(corrupted))
    return torch.stack(images)


def plain_text(
    paint: Callable[[TextStates], Tensor],
    reader: Reader,
    prompt: str,
    noise: Noise,
    sites: tuple[Site, ...],
) -> Tensor:
    """The same for the text encoder: each site's text is encoded, and its image made, alone."""
    pictures = [Picture(prompt), Picture(prompt, noise=noise)]
    pictures += [Picture(prompt, noise=noise, restored=(site.label,)) for site in sites]
    return torch.stack([paint(reader.table([own(picture)])) for picture in pictures])


@torch.no_grad()
def measure(
    name: str, style: str, steps: int, batch_size: int, repeats: int, device: str | None
) -> dict[str, Any]:
    """All figures, and whether the bars are held."""
    pipe = loco.load(name, device=device)
    model, concept = family_of(pipe), loco.shapeland.concept("style", style, prompts=1)
    (prompt,), ((noise,),) = concept.prompts, corruptions(model, concept, None, 1)[1]
    pictures = [Picture(prompt), Picture(prompt, noise=noise)]
    reader = Reader.of(model, pictures, Sampling(steps))
    texts = reader.table([own(picture) for picture in pictures])
    inner, outer = model.sites, model.text_sites(concept.prompts, concept.name, "all")
    modules = [model.module_of(site) for site in inner]
    run: dict[str, Any] = dict(
        seeds=[0], steps=steps, batch_size=batch_size, score=brightness, images=True
    )
    paint = partial(image, model, negative=reader.negative, steps=steps)
    plain = partial(plain_denoiser, paint, texts[:1], texts[1:], modules)
    ways: dict[str, dict[str, Callable[[], Tensor]]] = {
        "denoiser": {
            "batched": lambda: loco.trace(pipe, concept, **run).images[:, 0, 0, 0],
            "plain": lambda: plain(cached=False),
            "cached": lambda: plain(cached=True),
        },
        "text_encoder": {
            "batched": lambda: loco.trace(
                pipe, concept, "text_encoder", tokens="all", **run
            ).images[:, 0, 0, 0],
            "plain": lambda: plain_text(paint, reader, prompt, noise, outer),
        },
    }
    paint(texts[:1])  # has run once before the clock starts
    found: dict[str, Any] = {}
    made: dict[str, Tensor] = {}
    for where, calls in ways.items():
        took = {
            way: min(
                seconds(partial(lambda w, c: made.__setitem__(w, c()), way, call), pipe.device)
                for _ in range(repeats)
            )
            for way, call in calls.items()
        }
        apart = [(made["batched"] - made[way]).abs().max() for way in calls]
        found[where] = {
            "sites": len(inner if where == "denoiser" else outer),
            "seconds": took,
            "ratio": {way: took[way] / took["batched"] for way in calls if way != "batched"},
            "max_abs_difference": max(0.0, float(max(apart)) - 0.5 / 255),
        }
    return {
        "model": model_name(pipe),
        "steps": steps,
        "batch_size": batch_size,
        "device": str(pipe.device),
        **found,
        "ratio_bar": RATIO_BAR,
        "difference_bar": DIFFERENCE_BAR,
        "passed": all(
            each["ratio"]["plain"] >= RATIO_BAR and each["max_abs_difference"] <= DIFFERENCE_BAR
            for each in found.values()
        ),
    }


def table(found: dict[str, Any]) -> str:
    """The figures, as they are printed."""
    lines = []
    for where in ("denoiser", "text_encoder"):
        each = found[where]
        lines.append(f"{where}: {each['sites']} sites, {found['steps']} steps, {found['device']}")
        for way, took in each["seconds"].items():
            lines.append(f"  {way:8} {took:6.1f} s  ratio {each['ratio'].get(way, 1):.2f}")
        lines.append(f"  beyond 8 bits apart {each['max_abs_difference']:.1e}")
    bars = f"bars: ratio of plain >= {RATIO_BAR}, apart <= {DIFFERENCE_BAR:.0e}"
    return "\n".join([*lines, bars])


def main() -> int:
    """Measure, print, and return 0 if both bars are held."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="mini-sd", help="a mini")
    parser.add_argument("--style", default="Mira Dunn", help="the style that is traced")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    loco.progress(False)
    found = measure(args.model, args.style, args.steps, args.batch_size, args.repeats, args.device)
    sites = {where: found[where]["sites"] for where in ("denoiser", "text_encoder")}
    return finish(args, found, n={**sites, "repeats": args.repeats}, text=table(found))


if __name__ == "__main__":
    sys.exit(main())
