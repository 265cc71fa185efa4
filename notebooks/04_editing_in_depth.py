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
# # Editing in depth: one solver, many methods
#
# LocoEdit, UCE, TIME and Diff-QuickFix were published as different methods. They
# are one linear solve that is handed different rows and put on different
# weights. Here they stand side by side, on the same prompts and the same noise,
# against a model of which we know what it should show.

# %% tags=["parameters"]
model = "mini-sd"
artist = "Mira Holt"  # the style to remove
prompts = 12  # prompts an edit is made from
lam = 20.0  # price of changing a weight; a squared key is 128 here
count = 6  # held-out captions per question
at_once = (1, 4, 8, 12)  # objects removed together
steps = 6  # of the scheduler, for each picture
dtype = "float64"  # the same picture on every CPU; float32 is faster

# %%
import tempfile
import warnings
from pathlib import Path

import pandas as pd
import torch
from diffusers.utils import logging
from myst_nb import glue

import loco_core as loco
from loco_core.display import (
    image_grid,
    interference_map,
    trade_off,
    window_slider,
)

world = loco.shapeland
loco.progress(False)
logging.set_verbosity_error()  # of LoRA files without a text encoder
pipe = loco.load(model, dtype=getattr(torch, dtype))
layers = world.truth(model)[
    "style"
]  # LocoGen finds them: chapter LocoGen
artists = world.ATTRIBUTES["style"]

# %% [markdown]
# ## Rows, and what is done with them
#
# Every method asks for the minimum of
#
# $$
# \sum_i s_i \lVert W' c_i - W g_i \rVert^2
# + \sum_j r_j \lVert W' p_j - W p_j \rVert^2
# + \lambda \lVert W' - W \rVert^2 ,
# $$
#
# with rows $c_i$ that shall be read as $g_i$, and rows $p_j$ that shall stay. The
# answer is one map $T$ for all weights that read the same rows, $W' = W T$, so
# methods differ in three things: which weights, which rows, what is preserved.

# %%
concept = world.concept("style", artist, prompts=prompts)
others = [name for name in artists if name != artist]
spare = [*concept.neutral, *concept.renamed(others)]
print(concept.prompts[0], "->", concept.neutral[0])
print("preserved, for example:", spare[-1])

# %% [markdown]
# `spare` is what should not move: the neutral twins, and the same prompts by
# other artists. The null space of SPEED is another way to spare: there the map may
# not touch the start token and the empty prompt at all. Seven edits, each made in
# milliseconds; nothing is changed yet.

# %%
with warnings.catch_warnings(record=True) as said:
    edits = {
        "LocoEdit as published": loco.locoedit(
            pipe, concept, layers, lam=0.01, tokens="last"
        ),
        "LocoEdit": loco.locoedit(
            pipe, concept, layers, lam, preserve=spare
        ),
        "LocoEdit, null space": loco.locoedit(
            pipe, concept, layers, lam, null_space=()
        ),
        "UCE": loco.uce(pipe, concept, preserve=spare, lam=lam),
        "TIME": loco.time_edit(pipe, concept, lam=lam),
        "Diff-QuickFix as published": loco.diff_quickfix(
            pipe, concept, lam=0.01, tokens="last"
        ),
        "Diff-QuickFix": loco.diff_quickfix(
            pipe, concept, lam=0.1, tokens="eos", preserve=spare
        ),
    }

# %% [markdown]
# The library warns of edits that look wrong before a picture is made:

# %%
for warning in said:
    print("-", str(warning.message).replace(">", ">\n ", 1), end="\n\n")

# %% [markdown]
# Before any picture is made, the algebra tells what each of them does. The
# *residual* of an edited row is how far it still is from its target, as a part of
# the way; the *change* of a weight is $\lVert W' - W \rVert / \lVert W \rVert$.


# %%
def in_short(edit: loco.Edit) -> dict[str, object]:
    """What the algebra says of an edit."""
    found = loco.diagnose(pipe, edit)
    rows = found.rows_to_frame().groupby("role").residual.mean()
    return {
        "weights": len(edit.changes),
        "rank": max(found.ranks.values()),
        "residual": f"{rows['edited']:.2f}",
        "preserved rows moved": f"{rows['preserved']:.2f}"
        if "preserved" in rows
        else "none preserved",
        "largest change": f"{max(found.changes.values()):.2f}",
    }


pd.DataFrame(
    {name: in_short(edit) for name, edit in edits.items()}
).T.rename_axis("edit")

# %% [markdown]
# ## The same questions for every method
#
# `loco.evaluate` asks captions that no edit was made from. *Efficacy*: is the
# style gone? *Generality*: also in other words, and with the name misspelled?
# *Specificity*: are other artists, and everything else in the same pictures,
# still there? The unedited model answers too: what it does not show, no edit can
# take credit for.

# %%
used = {*concept.prompts, *spare}
probes = world.probes("style", artist, count=count, exclude=used)
asked = [
    probe
    for probe in probes
    if probe.group
    in (
        "efficacy",
        "generality: template",
        "specificity: others",
        "specificity: same image",
    )
]
found = loco.evaluate(
    pipe, edits, concept, probes=asked, seeds=[0], steps=steps
)
summary = found.summary()
shares = ["efficacy", "generality", "specificity"]
summary[shares].map("{:.0%}".format)

# %% tags=["picture-trade_off"] mystnb={"figure": {"name": "fig-trade-off", "caption": "What is erased against what is kept, a point per method, with 95 % intervals over captions."}, "image": {"alt": "Scatter plot of the methods: share of pictures in which the style is gone against share in which everything else is kept", "classes": "dark-light"}}
trade_off(summary, ylabel="the style is gone")

# %%
ends = summary[
    [
        f"{share} {end}"
        for share in ("efficacy", "specificity")
        for end in ("low", "high")
    ]
]
ends.map("{:.0%}".format)

# %% [markdown]
# The first picture of three questions, for every method.

# %% mystnb={"figure": {"name": "fig-methods", "caption": "The same noise under every edit: two captions with the style, in different words, and one with another artist."}, "image": {"alt": "Grid of pictures: a row per edit, three columns for two captions with the style and one with another artist", "classes": "dark-light"}}
shown = ["efficacy", "generality: template", "specificity: others"]
columns = [found.groups.index(group) for group in shown]
image_grid(
    found.images[:, columns],
    rows=found.edits,
    columns=["the style", "in other words", "another artist"],
    inches=1.0,
)

# %% [markdown]
# ## Where does the edit belong?
#
# The same map, put on other layers: in a random window, in all layers, and where
# LocoGen says. Each question is asked on its own, beside the unedited model: some
# misspellings it does not follow in the first place.

# %%
placed = loco.evaluate(
    pipe,
    edits["LocoEdit"],
    concept,
    probes=world.probes("style", artist, count=3, exclude=used),
    seeds=[0],
    steps=steps,
)
table = placed.to_frame().replace({"edit": {"edit": "located window"}})
table["shown"] = [
    f"{value:.0%}"
    if measure == "share seen"
    else f"CLIP-Score {value:.0f}"
    for value, measure in zip(table["value"], table["measure"])
]
table.pivot(
    index=["group", "should be"], columns="edit", values="shown"
)[["no edit", "located window", "random window", "all layers"]]

# %% [markdown]
# A random window does nothing: the style is not read there. All layers remove it as
# the located window does, and with the right rows preserved they spare the rest as
# well: here localisation buys a smaller edit, 4 weights instead of 32, not a
# gentler one.
#
# ## Many at once
#
# Two concepts interfere if their keys point the same way. The Gram matrix of the
# keys shows it in advance: here the end-of-text keys of one prompt per artist.

# %%
pair = {
    name: loco.Concept(
        name,
        "style",
        [f"a red star in the style of {name}"],
        ["a red star"],
    )
    for name in artists
}
joint = loco.locoedit(pipe, list(pair.values()), layers, lam)
(solve, *_) = loco.diagnose(pipe, joint).solves.values()
last = [
    i for i, label in enumerate(solve.labels) if label.endswith("| end")
]

# %% mystnb={"figure": {"name": "fig-interference", "caption": "Cosines between the end-of-text keys of the same prompt by eight artists. Names that end in the same word are closest."}, "image": {"alt": "Heat map of cosines between the keys of eight artists", "classes": "dark-light"}}
cosines = solve.gram[last][:, last]
interference_map(cosines, artists)

# %% [markdown]
# Now objects, more and more of them, in one solve and one after the other. One
# after the other is `loco.compose`: a map does not depend on the weights, so
# editing the edited model is a product of maps.

# %%
objects = world.ATTRIBUTES["object"]
where = world.truth(model)["object"]
captions = [
    world.caption(
        object=name, color="red", place="forest", style=artists[i % 8]
    )
    for i, name in enumerate(objects)
]


def remove(names: tuple[str, ...], together: bool) -> loco.Edit:
    """An edit that removes objects, sparing the twins and the objects that stay."""
    asked = [
        world.concept("object", n, prompts, seed=i)
        for i, n in enumerate(names)
    ]
    stay = [name for name in objects if name not in names]
    kept = [
        [*dict.fromkeys(c.neutral), *(c.renamed(stay) if stay else ())]
        for c in asked
    ]
    if together:
        return loco.locoedit(
            pipe, asked, where, lam, preserve=sum(kept, [])
        )
    edit, *rest = (
        loco.locoedit(pipe, c, where, lam, preserve=k)
        for c, k in zip(asked, kept)
    )
    for later in rest:
        edit = loco.compose(edit, later)
    return edit


def objects_seen(edit: loco.Edit) -> list[bool]:
    """Per object: whether the judge sees it."""
    with edit.applied(pipe):
        images = loco.generate(pipe, captions, steps=steps)
    answers = world.judge(images)["object"]
    return [answer == name for answer, name in zip(answers, objects)]


rows = []
warnings.simplefilter("ignore")  # large edits are what is tried here
for many in at_once:
    for together in (True, False) if 1 < many < 12 else (True,):
        edit = remove(objects[:many], together)
        seen = objects_seen(edit)
        rows.append(
            {
                "removed": many,
                "solve": "together"
                if together
                else "one after the other",
                "still seen": f"{sum(seen[:many])} of {many}",
                "others kept": f"{sum(seen[many:])} of {len(objects) - many}"
                if many < len(objects)
                else "none left",
                "rank, of 128": next(iter(edit.changes.values())).rank,
            }
        )
pd.DataFrame(rows).set_index(["removed", "solve"])

# %% [markdown]
# A key has 128 numbers and, behind a LayerNorm, 127 directions to move in. Eight
# objects use them all up. Solved together, the rest is still told apart; one after
# the other, a later edit does not know what the earlier ones moved, and takes more
# with it. Interference is a count of dimensions, not bad luck: Stable Diffusion 1.5
# has 768.
#
# ## A fact, updated
#
# Erasing is one use. A fact can be made to show something else: the target is
# not a neutral twin but the new answer.

# %%
country = world.ATTRIBUTES["fact"][0]
fact = world.concept("fact", country, prompts=1)
print(fact.prompts[0], "->", fact.target[0])
update = loco.locoedit(pipe, fact, world.truth(model)["fact"], lam=lam)


def emblem() -> torch.Tensor:
    """Three pictures of the emblem."""
    return loco.generate(
        pipe, [world.caption(fact=country)], range(3), steps
    )[0]


was = emblem()
with update.applied(pipe):
    now = emblem()
target = loco.generate(pipe, fact.target, range(3), steps)[0]

# %% mystnb={"figure": {"name": "fig-fact", "caption": "A fact before and after its update, and what it was updated to."}, "image": {"alt": "Three rows of three pictures: the emblem before, after the update, and the emblem it was updated to", "classes": "dark-light"}}
image_grid(
    torch.stack([was, now, target]),
    rows=["before", "updated", "target"],
    inches=1.2,
)

# %%
names = {"before": was, "updated": now, "target": target}
pd.DataFrame(
    {
        row: {
            k: ", ".join(world.judge(x)[k]) for k in ("object", "color")
        }
        for row, x in names.items()
    }
).T

# %% [markdown]
# ## How much of it
#
# An edit can be put on in part, `edit.applied(pipe, scale=0.5)`, and beyond. Move
# the slider.

# %%
scales = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5)
caption = world.caption(object="house", color="green", style=artist)


def at(scale: float) -> torch.Tensor:
    """The caption's picture under a part of the edit."""
    if scale == 0:
        return loco.generate(pipe, [caption], steps=steps)[0]
    with edits["LocoEdit"].applied(pipe, scale=scale):
        return loco.generate(pipe, [caption], steps=steps)[0]


part = [at(scale) for scale in scales]
window_slider(
    part,
    [f"{scale:g} of the edit" for scale in scales],
    alt=f"{caption}, under a part of the edit",
    name="scale",
    start=5,
    scale=4,
)

# %%
pd.Series(
    [world.judge(x)["style"][0] for x in part],
    index=pd.Index(scales, name="scale"),
    name="style seen",
).to_frame()

# %% [markdown]
# ## It travels
#
# An edit is saved as its two factors; the same edit as a LoRA file loads into
# diffusers, ComfyUI, A1111 and Forge, without this library.

# %%
with tempfile.TemporaryDirectory() as folder:
    saved, lora = (
        Path(folder) / "edit.safetensors",
        Path(folder) / "lora.safetensors",
    )
    edits["LocoEdit"].save(saved)
    edits["LocoEdit"].to_lora(lora, pipe)
    sizes = [path.stat().st_size for path in (saved, lora)]
    plain = loco.load(model, dtype=getattr(torch, dtype))
    plain.load_lora_weights(lora, adapter_name="edit")
    images = {}
    for weight in (0.0, 1.0):
        plain.set_adapters(["edit"], adapter_weights=[weight])
        images[weight] = loco.generate(plain, [caption], steps=steps)[0]
print("edit within 64 KB:            ", sizes[0] <= 64 * 1024)
print("LoRA file within 256 KB:      ", sizes[1] <= 256 * 1024)
print(
    "LoRA at 1.0 is the edit:      ",
    bool((images[1.0] - part[5]).abs().max() <= 1e-3),
)
print(
    "LoRA at 0.0 is the original:  ",
    bool((images[0.0] - part[0]).abs().max() <= 1e-5),
)

# %% [markdown]
# ## For the record
#
# What [](../book/paper_versus_here.md) and [](../book/which_edit.md) quote from
# this chapter.

# %%
record = {
    "zoo_model": model,
    **{
        f"{key}_{name}": "{:.0%} ({:.0%} to {:.0%})".format(
            *summary.loc[
                edit, [column, f"{column} low", f"{column} high"]
            ]
        )
        for key, edit in {
            "published": "LocoEdit as published",
            "locoedit": "LocoEdit",
            "null_space": "LocoEdit, null space",
            "uce": "UCE",
            "time": "TIME",
            "quickfix": "Diff-QuickFix",
        }.items()
        for name, column in {
            "gone": "efficacy",
            "kept": "specificity",
        }.items()
    },
}
for key, value in record.items():
    glue(key, value, display=False)
pd.Series(record, name="value").to_frame()
