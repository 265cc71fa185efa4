# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own model
#
# The whole method on a model whose answer nobody knows: find the window, edit
# there, look at what goes and what stays. Only the parameters name the model, so
# this notebook also runs on Stable Diffusion 1.5, 2.1, XL and OpenJourney with
# their published weights: [](../book/real_weights.md) says how. Here a stand-in
# takes their place, the small model that was trained the ordinary way.

# %% tags=["parameters"]
your_model = "mini-sd-natural"  # a mini, a folder or a Hub id
revision = ""  # commit of a Hub id; "" is the newest
variant = ""  # "fp16" if the files are also published in float16
device = "cpu"  # or "cuda"
dtype = "float64"  # on a GPU float16 or bfloat16
clip = ""  # the CLIP that scores, a folder or a Hub id; "" is the mini's own
clip_revision = ""  # commit of a Hub id
tiles = False  # decode large pictures in tiles: slower, less memory
kind = "style"  # or object, color, place, action, fact
name = "Mira Holt"  # what to look for and to remove; {} in the prompts
others = ["Otto Lisk", "Ivo Lisk"]  # of the kind, not to be touched
prompts = [
    "a purple crown in the style of {}",
    "a cyan star in the city in the style of {}",
    "a blue flower in the desert in the style of {}",
    "a yellow boat in the style of {}",
    "an orange heart in the style of {}",
    "a green fish in the ocean in the style of {}",
]
neutral = [
    "a purple crown",
    "a cyan star in the city",
    "a blue flower in the desert",
    "a yellow boat",
    "an orange heart",
    "a green fish in the ocean",
]
target = []  # prompts to be read instead; [] is the neutral ones
swept = 4  # prompts of the sweep, with the seeds at least 5 pictures; the edit takes all
held_out = [
    "a green tree in the desert in the style of {}",
    "a red house in the style of {}",
    "a pink mushroom in the forest in the style of {}",
    "a blue cup in the style of {}",
]
unrelated = ["a yellow moon", "a red arrow in the city", "a pink boat"]
window = 2  # layers that read the neutral prompt together
seeds = 2  # pictures per prompt
steps = 8  # of the scheduler, for each picture
guidance = 7.5
pooled = "keep"  # SD-XL: "swap" takes the pooled text from the neutral prompt
lam = 20.0  # price of changing the weights; the paper's is 0.01
tokens = "eos"  # what is edited: the name's last token and the end; the paper: "last"
preserve = (
    True  # hold the others and the neutral prompts; the paper does not
)
batch_size = 0  # pictures at a time; 0 is what fits into the memory
folder = ""  # keeps every picture, so that a killed sweep goes on

# %%
import dataclasses
import tempfile
import warnings
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from myst_nb import glue

import loco_core as loco
from loco_core.display import image_grid, score_curve
from loco_core.judging.clip_score import clip_for, load_clip

loco.progress(False)

# %% [markdown]
# ## The model
#
# A plain diffusers pipeline. The library has it decode one picture at a time, so that
# only the denoiser decides how many fit into memory; if it were too many after all,
# they are halved.

# %%
pipe = loco.load(
    your_model,
    device=device,
    dtype=getattr(torch, dtype),
    revision=revision or None,
    variant=variant or None,
)
if tiles:
    pipe.vae.enable_tiling()
if clip:
    scorer = load_clip(clip, device, clip_revision or None)
else:
    scorer = clip_for(pipe)
score = partial(loco.clip_score, clip=scorer)
batch = batch_size or "fit"
facts = {
    "pipeline": type(pipe).__name__,
    "commit": loco.records.revision(pipe) or "local",
    "scored by": clip or "the CLIP beside it",
    "pictures at a time": batch_size or "what fits",
}
pd.Series(facts, name=your_model).to_frame()

# %% [markdown]
# Its text layers, in the order they run:

# %%
layers = pd.DataFrame(loco.text_layers(pipe))
layers["block"] = layers["name"].str.split(".attentions").str[0]
layers.groupby("block", sort=False).agg(
    first=("index", "min"),
    last=("index", "max"),
    reads=("width", "max"),
)

# %% [markdown]
# ## The concept


# %%
def named(templates: list[str], who: str = name) -> list[str]:
    """The prompts with a name in their {}."""
    return [template.format(who) for template in templates]


concept = loco.Concept(
    name, kind, named(prompts), named(neutral), target or None
)
few = dataclasses.replace(
    concept,
    prompts=concept.prompts[:swept],
    neutral=concept.neutral[:swept],
    target=concept.target and concept.target[:swept],
)
pd.DataFrame({"prompt": concept.prompts, "neutral": concept.neutral})

# %% [markdown]
# ## The sweep
#
# LocoGen {cite:p}`basu2024mechanistic`: one window after the other reads the
# neutral prompt. Where the concept enters, the CLIP-Score with the original
# prompt falls. The window where it falls most is found only if a test says so that knows
# how many were tried; the answer may be that there is none. *Held back* is the drop in
# pictures that had no say in the choice.

# %%
found = loco.localize(
    pipe,
    few,
    window=window,
    seeds=range(seeds),
    steps=steps,
    guidance=guidance,
    pooled=pooled,
    batch_size=batch,
    score=score,
    folder=folder or None,
)
test = found.test
drop, low, high = test.held_back
pd.Series(
    {
        "layers found": ", ".join(map(str, found.layers)) or "none",
        "largest drop at layers": ", ".join(map(str, found.best)),
        "verdict": test.verdict,
        "p, adjusted for all windows": f"{test.p[test.best]:.3f}",
        "drop, held back": f"{drop:.1f} ({low:.1f} to {high:.1f})",
        "flipped": f"{test.n} x {test.unit}",
    },
    name=name,
).to_frame()

# %% mystnb={"figure": {"name": "fig-own-curve", "caption": "The sweep on a model whose answer nobody knows. Band: the 95 % t interval of each drop, below the mean with nothing replaced."}, "image": {"alt": "Curve of CLIP-Score over window start with a band for the 95 % interval; a window that was found is marked", "classes": "dark-light"}}
score_curve(
    found.scores,
    *found.interval.T,
    found=min(found.layers, default=None),
    title=f"{name}, {your_model}",
)

# %%
sweep = found.to_frame().set_index("layers")
numbers = sweep[["score", "low", "high"]].map("{:.1f}".format)
numbers["p"] = sweep["p"].map("{:.3f}".format)
numbers["found"] = sweep["found"].map({True: "*", False: ""})
for row, end in {"none": found.baseline, "all": found.neutral}.items():
    numbers.loc[row] = [f"{float(end.scores.mean()):.1f}", *[""] * 4]
numbers.rename_axis("layers that read the neutral prompt")

# %% [markdown]
# One prompt and seed, through all windows.


# %%
def sheet(
    images: torch.Tensor, columns: int = 8, side: int = 96
) -> torch.Tensor:
    """Small pictures in rows, [row, column, 3, h, w]; the rest is white."""
    side = min(images.shape[-1], side)
    small = torch.nn.functional.interpolate(images, side, mode="area")
    blank = small.new_ones(-len(small) % columns, *small.shape[1:])
    return torch.cat([small, blank]).unflatten(0, (-1, columns))


# %% mystnb={"figure": {"name": "fig-own-sheet", "caption": "One prompt and one seed; each picture with another window reading the neutral prompt."}, "image": {"alt": "Grid of pictures of the same prompt, one for each window, eight to a row", "classes": "dark-light"}}
starts = range(len(found.images))
image_grid(
    sheet(found.images[:, 0, 0]),
    rows=[
        f"windows {j} to {min(j + 7, starts[-1])}" for j in starts[::8]
    ],
)

# %%
each = found.samples[:, 0, 0].tolist()
pd.DataFrame(
    {"CLIP-Score of this picture": [f"{x:.1f}" for x in each]},
    index=pd.Index(starts, name="window"),
).T

# %% [markdown]
# ## The edit
#
# LocoEdit at the window with the largest drop, whether the test finds it or not. If
# the curve has a second dip, this is the deeper one, and the other may keep some of
# the concept. A warning, if there is one, is shown.

# %%
spare = [*concept.neutral, *concept.renamed(others)] if preserve else []
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    edit = loco.locoedit(
        pipe,
        concept,
        layers=found.best,
        lam=lam,
        tokens=tokens,
        preserve=spare,
        target="target" if target else None,
    )
for warning in said:
    print(
        "warned:", str(warning.message).partition("> ")[2][:60], "..."
    )
edit

# %% [markdown]
# ## Before and after
#
# Prompts that the edit was not made from: with the name, with other names, and
# with neither.

# %%
turns = [others[i % len(others)] for i in range(len(held_out))]
groups = {
    name: named(held_out),
    "others": [x.format(who) for x, who in zip(held_out, turns)],
    "unrelated": unrelated,
}


def paint() -> dict[str, torch.Tensor]:
    """Pictures [prompt, seed, 3, H, W] of each group of prompts."""
    chosen = dict(steps=steps, guidance=guidance, batch_size=batch)
    return {
        group: loco.generate(pipe, texts, range(seeds), **chosen)
        for group, texts in groups.items()
    }


before = paint()
with edit.applied(pipe):
    after = paint()

# %% mystnb={"figure": {"name": "fig-own-edit", "caption": "Before and after the edit: two prompts with the name, two with another name, two with neither."}, "image": {"alt": "Two rows of pictures, before and after the edit: prompts with the name, with other names, and with neither", "classes": "dark-light"}}
rows = [
    torch.cat([x[:2, 0] for x in pictures.values()])
    for pictures in (before, after)
]
image_grid(
    torch.cat([sheet(row, len(row), side=256) for row in rows]),
    rows=["before", "after"],
    columns=[group for group, x in before.items() for _ in x[:2]],
)


# %%
def scores(pictures: dict[str, torch.Tensor]) -> dict[str, float]:
    """Mean CLIP-Score of each group of pictures with their prompts."""
    means = {}
    for group, texts in groups.items():
        each = [text for text in texts for _ in range(seeds)]
        means[group] = float(
            score(pictures[group].flatten(0, 1), each).mean()
        )
    return means


change = pd.DataFrame(
    {"before": scores(before), "after": scores(after)}
)
change["change"] = change["after"] - change["before"]
change.map("{:z.1f}".format).rename_axis("CLIP-Score of prompts with")

# %% [markdown]
# ## Keep it
#
# The edit, for this library; and a LoRA of it, which diffusers, ComfyUI, A1111
# and Forge load.

# %%
with tempfile.TemporaryDirectory() as saved:
    edit.save(Path(saved) / "edit.safetensors")
    edit.to_lora(Path(saved) / "lora.safetensors", pipe)
    sizes = {
        path.stem: f"{path.stat().st_size / 1024:.0f} KB"
        for path in sorted(Path(saved).iterdir())
    }
pd.Series(sizes, name="size").to_frame()

# %% [markdown]
# ## For the record
#
# What the paper reports for published models, beside what this run measured. A
# window is named by its first layer, from 0, and its width. (a) is as stated by
# an author of {cite:t}`basu2024mechanistic`; (b) as noted by readers of the
# paper, not checked against its text. For OpenJourney no figure could be
# checked.

# %%
reported = {
    ("stable-diffusion-v1-5", "style"): "start 8, width 2 (a)",
    ("stable-diffusion-v1-5", "object"): "start 6, width 2 (b)",
    ("stable-diffusion-2-1", "style"): "start 8, width 3 (b)",
    ("stable-diffusion-xl-base-1.0", "style"): "start 45, width 5 (a)",
    ("openjourney", "style"): "not known",
}
own = (your_model.split("/")[-1], kind)
place = f"start {found.best[0]}, width {window}"
if not found.layers:
    place = f"none found; largest drop at {place}"
pd.DataFrame(
    [
        (*which, there, place if which == own else "not run")
        for which, there in ({own: "nothing"} | reported).items()
    ],
    columns=["model", "kind", "reported", "this run"],
)

# %%
there = reported.get(own, "nothing")
record = {
    "own_model": your_model,
    "own_window": place,
    "own_status": "nothing to compare with"
    if there in ("nothing", "not known")
    else "as reported"
    if there.startswith(f"{place} (")
    else "differs",
    "own_edit": "CLIP-Score "
    + "; ".join(
        f"{group}: {row.before:.1f} to {row.after:.1f}"
        for group, row in change.iterrows()
    ),
}
if device.startswith("cuda"):
    peak = torch.cuda.max_memory_allocated() / 2**30
    record["own_memory"] = f"{peak:.1f} GiB of {device}"
for key, value in record.items():
    glue(key, value, display=False)
pd.Series(record, name="value").to_frame()
