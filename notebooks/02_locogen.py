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
# # LocoGen: find the layers
#
# All text layers read the same prompt. Which of them use the words that name a
# style? LocoGen {cite:p}`basu2024mechanistic` finds out by letting a few layers
# read a prompt without these words.

# %% tags=["parameters"]
model = "mini-sd"
natural = "mini-sd-natural"  # its twin, trained the ordinary way
artist = "Mira Holt"  # the style to look for
thing = "star"  # the object to look for
window = 2  # layers that read the neutral prompt together
prompts = 4  # prompts per concept; with the seeds at least 5 pictures
seeds = 2  # pictures per prompt
steps = 8  # of the scheduler, for each picture
dtype = "float64"  # the same picture on every CPU; float32 is faster

# %%
import pandas as pd
import torch
from myst_nb import glue

import loco_core as loco
from loco_core.display import (
    image_grid,
    routing_matrix,
    score_curve,
    window_slider,
)

world = loco.shapeland
loco.progress(False)
pipe = loco.load(model, dtype=getattr(torch, dtype))
truth = world.truth(model)
layers = len(loco.text_layers(pipe))

# %% [markdown]
# ## One window, by hand
#
# A prompt $c$ with the style, and its neutral twin $c'$.

# %%
prompt = world.caption(object="house", color="blue", style=artist)
neutral = world.caption(object="house", color="blue")
print(prompt)
print(neutral)

# %% [markdown]
# The experiment is one matrix. Row $b$ is a picture, column $l$ a text layer,
# and the entry says which text this layer of this picture reads: 0 is the
# prompt, 1 the twin. First row: everything as usual. Last row: the twin
# everywhere. In between, one window reads the twin.

# %%
planted = truth["style"]
reads = {
    "usual": [],
    "layers 2, 3": [2, 3],
    f"layers {planted[0]}, {planted[1]}": planted,
    "neutral": list(range(layers)),
}
routes = torch.zeros(len(reads), layers, dtype=torch.long)
for row, chosen in enumerate(reads.values()):
    routes[row, chosen] = 1
print("\n".join("".join(map(str, row)) for row in routes.tolist()))

# %% [markdown]
# All rows start from the same noise; only what is read differs.

# %%
pictures = loco.generate(
    pipe,
    [prompt] * len(routes),
    seeds=[0, 1, 2, 3],
    steps=steps,
    routes=routes,
    sources=[prompt, neutral],
)

# %% tags=["picture"] mystnb={"figure": {"name": "fig-by-hand", "caption": "Four seeds, four ways to read: the usual one, two windows that read the neutral prompt, and the neutral prompt everywhere."}, "image": {"alt": "Grid of pictures: four rows for the way of reading, four columns for the seed", "classes": "dark-light"}}
image_grid(
    pictures, rows=list(reads), columns=[f"seed {s}" for s in range(4)]
)


# %%
def seen(images: torch.Tensor, kind: str, name: str) -> list[str]:
    """Of the images of each row, how many the judge says show `name`."""
    answers = [world.judge(row)[kind] for row in images]
    return [
        f"{sum(a == name for a in row)} of {len(row)}"
        for row in answers
    ]


pd.DataFrame(
    {
        f"shows {artist}": seen(pictures, "style", artist),
        "shows a house": seen(pictures, "object", "house"),
    },
    index=pd.Index(reads, name="reads"),
)

# %% [markdown]
# ## Your own routing
#
# With a kernel, the matrix below can be clicked: choose for every layer which prompt
# it reads, and paint. Here the layers of objects read a third prompt, all others the
# first: the object of one, in the style of the other. A page shows this routing,
# beside what each prompt gives alone.

# %%
mixed = world.caption(object="star", color="blue")
mix = [2 if k in truth["object"] else 0 for k in range(layers)]
routing_matrix(
    pipe, [prompt, neutral, mixed], mix, seeds=[0, 1], steps=steps
)

# %% [markdown]
# ## The sweep
#
# LocoGen does this for every window, over several prompts and seeds, and scores
# each picture against the *original* prompt with CLIP:
#
# $$
# a_j = \frac{1}{|P||S|} \sum_{p, s} \mathrm{CLIPScore}\bigl(x^{(j)}_{p,s},\, p\bigr),
# \qquad \hat\jmath = \arg\min_j a_j .
# $$
#
# One window is always the lowest, even if none does anything. So the lowest counts as
# *found* only if a test says so that knows how many windows were tried: by how much the
# score of each picture falls is given random signs, for all windows at once, and that
# has to be lower than what chance makes of the lowest ([](../book/methods.md)). How far
# the score falls is then read from pictures that had no say in the choice: *held back*.

# %%
style = world.concept("style", artist, prompts=prompts)
found = loco.localize(
    pipe, style, window=window, seeds=range(seeds), steps=steps
)
print("layers found:  ", list(found.layers))
print("layers planted:", truth["style"])


# %%
def decided(result: loco.Localization) -> pd.DataFrame:
    """What the test says of the window with the largest drop."""
    test = result.test
    drop, low, high = test.held_back
    return pd.Series(
        {
            "largest drop at layers": ", ".join(map(str, result.best)),
            "verdict": test.verdict,
            "p, adjusted for all windows": f"{test.p[test.best]:.3f}",
            "drop, held back": f"{drop:.1f} ({low:.1f} to {high:.1f})",
            "flipped": f"{test.n} x {test.unit}",
        },
        name=result.concept.name,
    ).to_frame()


def start(result: loco.Localization) -> int | None:
    """The first layer that was found, if one was."""
    return min(result.layers, default=None)


decided(found)

# %% mystnb={"figure": {"name": "fig-style-curve", "caption": "Mean CLIP-Score of the pictures when a window reads the neutral prompt. Where the style enters, it falls. Band: the 95 % t interval of each drop, below the mean with nothing replaced."}, "image": {"alt": "Curve of CLIP-Score over window start with a band for the 95 % interval; found and planted window are marked", "classes": "dark-light"}}
score_curve(
    found.scores,
    *found.interval.T,
    found=start(found),
    planted=truth["style"][0],
    title=artist,
)

# %% [markdown]
# CLIP gives the curve; the judge, who has never seen CLIP, says what happened
# in the pictures.


# %%
def shown(
    result: loco.Localization, kind: str, name: str
) -> pd.DataFrame:
    """Per window: mean score, and how many pictures still show the concept."""
    pictures = result.images[:].flatten(1, 2)
    return pd.DataFrame(
        {
            "CLIP-Score": [f"{score:.1f}" for score in result.scores],
            f"shows {name}": seen(pictures, kind, name),
            "found": [
                "*" if item == result.layers else ""
                for item in result.items
            ],
        },
        index=pd.Index(range(len(pictures)), name="window"),
    )


shown(found, "style", artist)

# %% [markdown]
# ## Every window
#
# Two of the prompts, one window at a time. Move the slider, with the mouse or
# the arrow keys.


# %%
def sweep_slider(result: loco.Localization):
    """Pictures of every window, starting at the one with the largest drop."""
    last = result.window - 1
    names = [
        f"layers {j} to {j + last} read the twin"
        for j in range(len(result.images))
    ]
    return window_slider(
        result.images[:, :2],
        names,
        alt=f"pictures of {result.concept.name}",
        start=result.best[0],
    )


sweep_slider(found)

# %% [markdown]
# ## An object
#
# The same question about an object. Its neutral twin says "thing".

# %%
item = world.concept("object", thing, prompts=prompts)
found_object = loco.localize(
    pipe, item, window=window, seeds=range(seeds), steps=steps
)
print("layers found:  ", list(found_object.layers))
print("layers planted:", truth["object"])

# %%
decided(found_object)

# %% mystnb={"figure": {"name": "fig-object-curve", "caption": "The same sweep for an object."}, "image": {"alt": "Curve of CLIP-Score over window start for an object; found and planted window are marked", "classes": "dark-light"}}
score_curve(
    found_object.scores,
    *found_object.interval.T,
    found=start(found_object),
    planted=truth["object"][0],
    title=thing,
)

# %%
shown(found_object, "object", thing)

# %%
sweep_slider(found_object)

# %% [markdown]
# ## A model nobody planted
#
# The natural twin saw the same drawings and captions, but all its layers were
# told everything. The same sweep, for the same object. There is no right answer
# to hold it against; the question is whether any one window still does something,
# and the answer may be none.

# %%
twin = loco.load(natural, dtype=getattr(torch, dtype))
found_natural = loco.localize(
    twin, item, window=window, seeds=range(seeds), steps=steps
)
print("layers found:", list(found_natural.layers))

# %%
decided(found_natural)

# %% mystnb={"figure": {"name": "fig-natural-curve", "caption": "The sweep on the natural twin."}, "image": {"alt": "Curve of CLIP-Score over window start for an object on the natural twin; a window that was found is marked", "classes": "dark-light"}}
score_curve(
    found_natural.scores,
    *found_natural.interval.T,
    found=start(found_natural),
    title=f"{thing}, {natural}",
)

# %%
shown(found_natural, "object", thing)

# %% [markdown]
# ## For the record
#
# What [](../book/paper_versus_here.md) quotes from this chapter.


# %%
def verdict(result: loco.Localization, planted: list[int]) -> str:
    """Whether the window that was found is the planted one."""
    return (
        "found what was planted"
        if list(result.layers) == planted
        else "missed the plant"
    )


def place(result: loco.Localization) -> str:
    """The window that was found, as the papers name it."""
    if not result.layers:
        return f"none found ({result.test.verdict})"
    return f"start {result.layers[0]}, width {result.window}"


record = {
    "model_name": model,
    "style_window": place(found),
    "style_status": verdict(found, truth["style"]),
    "object_window": place(found_object),
    "object_status": verdict(found_object, truth["object"]),
}
for key, value in record.items():
    glue(key, value, display=False)
pd.Series(record, name="value").to_frame()
