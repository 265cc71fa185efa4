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
# # Neurons: how little of a layer is needed?
#
# LocoGen names layers, and LocoEdit changes all of their keys and values
# {cite:p}`basu2024mechanistic`. Perhaps a few outputs of these projections suffice.
# Call one of them a *neuron*. Which ones tell a style, and how many of them must go
# until it is gone?

# %% tags=["parameters"]
model = "mini-sd"
artist = "Mira Holt"  # the style to remove
prompts = 12  # prompts the neurons are ranked with
count = 5  # held-out captions with the style, and as many with others
tops = [10, 25, 51, 64, 100, 256]  # how many neurons are held still
steps = 6  # of the scheduler, for each picture
dtype = "float64"  # the same picture on every CPU; float32 is faster

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch
from myst_nb import glue

import loco_core as loco
from loco_core.display import window_slider
from loco_core.inside.neurons import ablation_curve
from loco_core.statistics import wilson

world = loco.shapeland
loco.progress(False)
pipe = loco.load(model, dtype=getattr(torch, dtype))
layers = world.truth(model)["style"]  # LocoGen finds them
concept = world.concept("style", artist, prompts=prompts)

# %% [markdown]
# ## The ranking
#
# A neuron is a row of $W_K$ or $W_V$, so its activation is linear in the encoded
# prompt $c$. No picture is needed to know it. Over prompts with the style ($s$) and
# their neutral twins ($n$), every neuron gets
#
# $$
# z = \frac{\mu_s - \mu_n}{\sqrt{\sigma_s^2 / n_s + \sigma_n^2 / n_n}} ,
# $$
#
# Welch's $t$. The paper reads the activations at the last token of the subject. Here
# they are read at the padding behind the text: a causal text encoder has let it read
# everything, and of a short prompt it is most of what a layer reads.

# %%
neurons = loco.rank_neurons(pipe, concept, layers)
neurons

# %%
neurons.to_frame().head(6).round(2)

# %% [markdown]
# Many neurons tell the style, the first ones far beyond any doubt:

# %%
pd.Series(
    {
        f"|z| above {bar}": f"{(neurons.z.abs() > bar).sum()} of {len(neurons)}"
        for bar in (2, 5, 10, 20)
    },
    name="neurons",
).to_frame()

# %% [markdown]
# That is the weakness of $z$: it says how *surely* a neuron differs, not how *far*.
# And a key that is held still does nothing to the text that is read, it only changes
# where the picture looks. On captions of the training split the fewest neurons were
# needed when only values are ranked, by the shift $|\mu_s - \mu_n|$ itself.

# %%
values = loco.rank_neurons(
    pipe, concept, layers, where=["to_v"], by="shift"
)
tenth = len(neurons) // 10

# %% [markdown]
# ## Erasure against collateral
#
# The first $k$ neurons are held at their mean over the neutral prompts, at every
# token, and the judge looks at held-out captions: those of the artist, and as many
# of the others.

# %%
scenes = [
    scene
    for scene in world.held_out_scenes(600, seed=8)
    if scene.object and scene.style
]
own = [scene for scene in scenes if scene.style == artist][:count]
others = [scene for scene in scenes if scene.style != artist][:count]
asked = own + others
captions = [world.describe(scene, i) for i, scene in enumerate(asked)]


def shares(images: torch.Tensor) -> dict[str, float]:
    """What the judge still sees, in pictures of the first captions."""
    seen = world.judge(images)
    style, thing = (
        [
            name == scene.get(kind)
            for name, scene in zip(seen[kind], asked)
        ]
        for kind in ("style", "object")
    )
    found = {"the style": style[:count], "other styles": style[count:]}
    found["objects"] = thing
    return {name: sum(x) / len(x) for name, x in found.items() if x}


numbers = sorted({0, *tops, tenth})
made = ablation_curve(pipe, values, captions, numbers, steps=steps)
made = made[:, :, 0]  # one seed
curve = pd.DataFrame(
    [shares(images) for images in made],
    index=pd.Index(numbers, name="neurons"),
)

# %% mystnb={"figure": {"name": "fig-neurons", "caption": "What is still shown with the first k neurons held still."}, "image": {"alt": "Three lines against the number of neurons: the share of pictures that show the style, other styles, and their objects", "classes": "dark-light"}}
axis = curve.rename(index=str).plot(
    marker="o", figsize=(7, 3.2), grid=True, ylabel="still shown"
)
axis.yaxis.set_major_formatter("{x:.0%}")
plt.close(axis.figure)
axis.figure

# %%
curve.map("{:.0%}".format)

# %% [markdown]
# Upper row: the style that is removed. Lower row: other styles.

# %%
window_slider(
    made,
    [f"{k} of {len(neurons)} neurons" for k in numbers],
    alt=f"five captions by {artist}, and five by others",
    name="neurons",
    columns=count,
)

# %% [markdown]
# ## Compared with what?
#
# A tenth of the neurons, chosen and held in other ways; and the whole layers, by
# LocoEdit and by LocoGen's swap, which is only for captions with the style. Five
# captions a bar; `benchmarks/neurons.py` has twenty, for every style.

# %%
as_published = loco.rank_neurons(pipe, concept, layers, token="last")
ways = {
    "keys and values by z": (neurons, tenth, "neutral_mean"),
    "as in the paper": (as_published, tenth, "neutral_mean"),
    "as in the paper, 100": (as_published, 100, "neutral_mean"),
    "at zero": (values, tenth, "zero"),
    "random values": (values.shuffled(), tenth, "neutral_mean"),
    "layers of objects": (
        loco.rank_neurons(
            pipe,
            concept,
            world.truth(model)["object"],
            where=["to_v"],
            by="shift",
        ),
        tenth,
        "neutral_mean",
    ),
}
found = {
    "no change": curve.loc[0],
    "values by shift": curve.loc[tenth],
}
for name, (ranked, k, mode) in ways.items():
    with ranked.ablated(pipe, k, mode):
        images = loco.generate(pipe, captions, steps=steps)
    found[name] = shares(images[:, 0])

spare = [name for name in world.ATTRIBUTES["style"] if name != artist]
whole = loco.locoedit(
    pipe,
    concept,
    layers,
    lam=20,
    preserve=[*concept.neutral, *concept.renamed(spare)],
)
with whole.applied(pipe):
    images = loco.generate(pipe, captions, steps=steps)
found["whole layers, LocoEdit"] = shares(images[:, 0])

twins = [
    world.describe(scene.without("style"), i)
    for i, scene in enumerate(own)
]
routes = torch.arange(count)[:, None].repeat(
    1, len(loco.text_layers(pipe))
)
routes[:, layers] += count
images = loco.generate(
    pipe,
    captions[:count],
    steps=steps,
    routes=routes,
    sources=[*captions[:count], *twins],
)
found["whole layers, swap"] = shares(images[:, 0])
compared = pd.DataFrame(found).T.rename_axis("what is held")

# %% mystnb={"figure": {"name": "fig-neurons-compared", "caption": "What is still shown after each choice of neurons. A good one has no blue bar and a full orange one."}, "image": {"alt": "Two bars for each choice of neurons: the share of pictures that still show the style, and the share of others that still show theirs", "classes": "dark-light"}}
axis = compared[["the style", "other styles"]][::-1].plot.barh(
    figsize=(7, 4), width=0.7, xlim=(0, 1), xlabel="still shown"
)
axis.xaxis.set_major_formatter("{x:.0%}")
axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
axis.figure.tight_layout()
plt.close(axis.figure)
axis.figure

# %%
compared.map(lambda x: "" if pd.isna(x) else f"{x:.0%}")

# %% [markdown]
# Which neurons, and what they are held at, both matter. As many random values, or
# values of the layers where objects enter, leave the style as it is, and so do as
# many neurons ranked and held as the paper has it. Zero is no neutral value: the
# mean over neutral prompts says "plain", zero says nothing.
#
# A tenth of the neurons is not few, though. In every projection a style is spread
# over most rows. A direction in the space of the prompt is the smaller description,
# and that is what LocoEdit changes. It is an edit of weights, too; to hold a value
# other than zero is not, since these projections have no bias.

# %% [markdown]
# ## For the record
#
# What [](../book/paper_versus_here.md) quotes from this chapter.

# %%
spares = curve["objects"] >= curve["objects"][0] - 0.05
enough = curve.index[(curve["the style"] <= 0.15) & spares]
paper = compared.loc["as in the paper, 100"]
lost = curve.iloc[0] - curve.loc[tops[-1]]
low, high = wilson(paper["the style"], count)
record = {
    "nr_model": model,
    "nr_needed": f"{enough[0]} of {len(neurons)}, values ranked by shift at the padding"
    if len(enough)
    else f"not by {tops[-1]} of {len(neurons)}",
    "nr_needed_status": "reproduced"
    if len(enough) and enough[0] <= 100
    else "not reproduced",
    "nr_paper": f"style still shown in {paper['the style']:.0%} with 100 neurons "
    f"({low:.0%} to {high:.0%})",
    "nr_paper_status": "reproduced"
    if paper["the style"] <= 0.15
    else "not reproduced",
    "nr_more": f"with {tops[-1]}, other styles lose {lost['other styles']:.0%}, "
    f"objects {lost['objects']:.0%}",
    "nr_more_status": "reproduced"
    if lost["other styles"] > 0.05 or lost["objects"] > 0.05
    else "not reproduced",
}
for key, value in record.items():
    glue(key, value, display=False)
pd.Series(record, name="value").to_frame()
