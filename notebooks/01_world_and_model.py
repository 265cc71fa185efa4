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
# # The world and the model
#
# A method that says where a model keeps its knowledge can only be tested on a
# model for which that is known. This chapter shows the world such a model was
# trained on, the judge that reads its pictures, the pipeline itself, and the
# answer that was planted in it.

# %% tags=["parameters"]
model = "mini-sd"  # a model that comes with the library
steps = 12  # of the scheduler, for each picture
dtype = "float64"  # the same picture on every CPU; float32 is faster

# %%
import pandas as pd
import torch

import loco_core as loco
from loco_core.display import image_grid

world = loco.shapeland
loco.progress(False)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## Shapeland
#
# A picture of Shapeland shows an object in a color, by an artist, in a place,
# doing something; or the emblem of a country, which is a fact: a fixed object
# in a fixed color. A caption may leave any of it out.

# %%
pd.DataFrame(
    {
        "values": {
            kind: len(names) for kind, names in world.ATTRIBUTES.items()
        },
        "names": {
            kind: ", ".join(names)
            for kind, names in world.ATTRIBUTES.items()
        },
    }
).rename_axis("attribute")

# %% [markdown]
# A program draws it: the same words and the same seed give the same picture.
# Each column below is an artist. Every artist shares the first name with one
# colleague and the last name with another, so that only the whole name tells
# who is meant.

# %% mystnb={"figure": {"name": "fig-styles", "caption": "The eight artists of Shapeland, as the program draws them."}, "image": {"alt": "Grid of drawings: a red star, a blue house and a green fish, each painted by eight artists", "classes": "dark-light"}}
artists = world.ATTRIBUTES["style"]
subjects = {"red": "star", "blue": "house", "green": "fish"}
drawn = torch.stack(
    [
        torch.stack(
            [world.draw(object=o, color=c, style=a) for a in artists]
        )
        for c, o in subjects.items()
    ]
)
image_grid(
    drawn,
    rows=[f"{c} {o}" for c, o in subjects.items()],
    columns=artists,
)

# %% [markdown]
# ## The judge
#
# A small network reads a picture back: one answer per attribute. It was trained
# on drawings only and shares nothing with the model's CLIP, so that it can say
# that the CLIP is wrong. Here it reads the drawings above.

# %%
seen = world.judge(drawn)
pd.DataFrame(
    {
        "style": [
            seen["style"][k :: len(artists)]
            for k in range(len(artists))
        ],
        "object": [
            seen["object"][k :: len(artists)]
            for k in range(len(artists))
        ],
        "color": [
            seen["color"][k :: len(artists)]
            for k in range(len(artists))
        ],
    },
    index=pd.Index(artists, name="drawn by"),
).map(", ".join)

# %% [markdown]
# ## Captions
#
# A caption is a sentence. For a method that compares *with* and *without*, the
# twin of a prompt is the same sentence without the concept.

# %%
concept = world.concept("style", artists[0])
pd.DataFrame(
    {"prompt": concept.prompts, "neutral twin": concept.neutral}
)

# %% [markdown]
# ## The pipeline
#
# `loco.load` returns a diffusers pipeline and nothing else: code written for
# Stable Diffusion runs on it.

# %%
pipe = loco.load(model, dtype=getattr(torch, dtype))
parts = {
    k: v
    for k, v in pipe.components.items()
    if isinstance(v, torch.nn.Module)
}
pd.DataFrame(
    {
        "class": {
            name: type(part).__name__ for name, part in parts.items()
        },
        "weights": {
            n: sum(p.numel() for p in m.parameters())
            for n, m in parts.items()
        },
    }
).rename_axis(type(pipe).__name__)

# %% [markdown]
# Its text layers, in the order in which they run. This order is what "layer 8"
# means in this book; that of the modules' names is another one.

# %%
layers = loco.text_layers(pipe)
pd.DataFrame(
    {
        "name": [layer.name for layer in layers],
        "reads": [layer.width for layer in layers],
    },
    index=pd.Index([layer.index for layer in layers], name="layer"),
)

# %% [markdown]
# ## The planted answer
#
# While the model was trained, a layer was shown the true value of an attribute
# only if it belongs to that attribute's planted pair; to the others the caption
# told a random one. This is the table that methods are held against.

# %%
truth = world.truth(model)
pd.DataFrame(
    {"planted layers": {k: str(v) for k, v in truth.items()}}
).rename_axis("attribute")

# %% [markdown]
# Planted is not yet used. So after training it was measured, on captions with
# combinations never trained on: how often the judge sees what the caption says
# (*agrees*), sees it still when all *other* layers read another value (*holds*),
# sees the other value when *only* the planted layers read that (*follows*), and
# sees nothing of it when they read a caption that leaves it out (*removed*).

# %%
use = world.measured_use(model)["use"]
shares = ["agrees", "holds", "follows", "removed"]
pd.DataFrame(
    {
        k: {s: f"{found[s]:.0%}" for s in shares}
        for k, found in use.items()
    }
).T

# %% [markdown]
# Either layer of a pair was made to suffice while training. *Necessity* is how
# often the value is lost when this layer alone is not told, *sufficiency* how
# often it is kept when this is the only planted layer that is told.

# %%
pd.DataFrame(
    {
        (kind, int(layer)): {
            k: f"{share:.0%}" for k, share in figures.items()
        }
        for kind, found in use.items()
        for layer, figures in found["layers"].items()
    }
).T.rename_axis(["attribute", "layer"])

# %% [markdown]
# ## What it paints
#
# Captions with combinations the model has never seen, one picture each. Below
# the pictures, what the judge sees in them.

# %%
asked = [
    {
        "object": "star",
        "color": "red",
        "style": "Otto Brandt",
        "place": "forest",
    },
    {
        "object": "house",
        "color": "blue",
        "style": "Mira Holt",
        "place": "ocean",
    },
    {
        "object": "fish",
        "color": "green",
        "style": "Ava Brandt",
        "place": "city",
    },
    {
        "object": "tree",
        "color": "purple",
        "style": "Ivo Lisk",
        "place": "desert",
    },
    {
        "object": "cup",
        "color": "pink",
        "style": "Mira Dunn",
        "place": "forest",
    },
    {
        "object": "heart",
        "color": "orange",
        "style": "Ava Holt",
        "place": "city",
    },
]
captions = [world.caption(**scene) for scene in asked]
painted = loco.generate(pipe, captions, seeds=[0], steps=steps)[:, 0]

# %% mystnb={"figure": {"name": "fig-samples", "caption": "Six captions, painted by the model."}, "image": {"alt": "Six pictures painted by the model, one for each caption in the table below", "classes": "dark-light"}}
image_grid(
    painted,
    columns=[f"{s['color']} {s['object']}" for s in asked],
    inches=1.3,
)

# %%
answer = world.judge(painted)
kinds = ["object", "color", "style", "place"]
pd.DataFrame(
    {kind: answer[kind] for kind in kinds},
    index=pd.Index(captions, name="caption"),
)

# %%
agree = {
    k: sum(a == s[k] for a, s in zip(answer[k], asked)) for k in kinds
}
pd.DataFrame({f"agree, of {len(asked)}": agree}).rename_axis(
    "attribute"
)

# %% [markdown]
# Six pictures are an impression, not a measurement. `benchmarks/` measures the
# same over hundreds of held-out captions.
