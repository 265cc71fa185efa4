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
# # Diff-QuickFix: change the text encoder
#
# LocoEdit changes layers of the denoiser. Diff-QuickFix
# {cite:p}`basu2024localizing` changes one matrix of the text encoder instead: the
# output projection of its *first* self-attention, where causal tracing found the
# only causal state. Whatever reads this text encoder is edited with it.

# %% tags=["parameters"]
model = "mini-sd"
natural = "mini-sd-natural"  # its twin with the same text encoder
artist = "Mira Holt"  # the style to remove
thing = "star"  # the object to remove
prompts = 12  # prompts an edit is made from
lam = 0.1  # price of changing the matrix
count = 6  # held-out captions per question
steps = 6  # of the scheduler, for each picture
dtype = "float64"  # the same picture on every CPU; float32 is faster

# %%
import warnings

import pandas as pd
import torch
from myst_nb import glue

import loco_core as loco
from loco_core.display import image_grid

world = loco.shapeland
loco.progress(False)
# an edit of this matrix is often larger than the matrix, and the library warns
# of it each time: chapter "Editing in depth" shows how
warnings.simplefilter("ignore")
pipe = loco.load(model, dtype=getattr(torch, dtype))

# %% [markdown]
# ## The same solve, one step earlier
#
# Inside the first self-attention, $W_{out}$ maps a mixture $k$ of values to the
# output $v = W_{out} k + b$. With $k_i$ for the prompt and $v_i$ for the target,
#
# $$
# W' = \Bigl(\lambda W + \sum_i (v_i - b)\, k_i^\top\Bigr)
#      \Bigl(\lambda I + \sum_i k_i k_i^\top\Bigr)^{-1} .
# $$
#
# Since $v_i - b = W g_i$, with $g_i$ the input for the target, this is LocoEdit's
# problem with other keys. The bias must leave the targets: who fits $v_i$ itself
# lets the module add $b$ a second time.

# %%
concept = world.concept("style", artist, prompts=prompts)
others = [name for name in world.ATTRIBUTES["style"] if name != artist]
spare = [*concept.neutral, *concept.renamed(others)]
edit = loco.diff_quickfix(
    pipe, concept, lam, tokens="eos", preserve=spare
)
edit

# %% [markdown]
# One weight changes:

# %%
loco.diagnose(pipe, edit).to_frame().round(2)

# %% [markdown]
# ## Which layer, which tokens?
#
# The paper's claim is about a place: the first self-attention layer, and no other,
# at the last token of the subject. Here is the edit in every layer of the text
# encoder, and in the first one with other tokens, asked on captions it was not
# made from.

# %%
probes = [
    probe
    for probe in world.probes(
        "style", artist, count, exclude={*concept.prompts, *spare}
    )
    if probe.group
    in ("efficacy", "specificity: others", "specificity: same image")
]


def quickfix(layer: int = 0, tokens: str = "eos") -> loco.Edit:
    """The edit in another layer, or of other tokens."""
    return loco.diff_quickfix(
        pipe, concept, lam, layer=layer, tokens=tokens, preserve=spare
    )


(encoder,) = loco.family_of(pipe).text_encoders.values()
by_layer = {
    f"layer {k}": quickfix(layer=k) for k in range(len(encoder))
}
by_tokens = {
    "layer 0, last token": quickfix(tokens="last"),
    "layer 0, all that follows": quickfix(tokens="following"),
    "layer 0, as published": loco.diff_quickfix(
        pipe, concept, lam=0.01, tokens="last"
    ),
}
found = loco.evaluate(
    pipe,
    by_layer | by_tokens,
    concept,
    probes=probes,
    seeds=[0],
    steps=steps,
).summary()[["efficacy", "specificity"]]
found.map("{:.0%}".format)

# %% [markdown]
# Only the first layer does it, as the paper says. But the last token of the name is
# not enough here: the end of the text has read the name too, and is what the layers
# of this model read. Published as it is, without rows that stay and with a dozen
# prompts, the edit is larger than the matrix and breaks other things first.
#
# ## One edit, every denoiser
#
# The natural twin shares the text encoder, and nobody planted anything in it. The
# same edit serves it, without any layer having been located. That is the strength
# of this place, and its weakness: whoever shares the encoder shares the edit.

# %%
twin = loco.load(natural, dtype=getattr(torch, dtype))
loco.evaluate(
    twin, {"edit": edit}, concept, probes=probes, seeds=[0], steps=steps
).summary()[["efficacy", "specificity"]].map("{:.0%}".format)

# %% [markdown]
# ## A whole object
#
# The paper also removes objects as such, by mapping them to "a". Here the target
# is "a thing", which Shapeland draws as a plain disc.

# %%
whole = world.concept("object", thing, prompts=prompts)
rest = [name for name in world.ATTRIBUTES["object"] if name != thing]
no_thing = loco.diff_quickfix(
    pipe,
    whole,
    lam,
    tokens="eos",
    preserve=[*whole.neutral, *whole.renamed(rest)],
)
asked = [
    world.caption(object=thing, color="red", place="forest"),
    world.caption(object=thing, color="blue", style=artist),
    world.caption(object="house", color="red", place="forest"),
    world.caption(object="fish", color="blue", style=artist),
]
before = loco.generate(pipe, asked, steps=steps)[:, 0]
with no_thing.applied(pipe):
    after = loco.generate(pipe, asked, steps=steps)[:, 0]

# %% mystnb={"figure": {"name": "fig-whole-object", "caption": "An object removed from the text encoder, and two that should stay."}, "image": {"alt": "Two rows of four pictures, before and after the edit: twice the object that is removed, twice another one", "classes": "dark-light"}}
image_grid(
    torch.stack([before, after]),
    rows=["before", "after"],
    columns=[
        caption.replace(" in the ", "\nin the ") for caption in asked
    ],
    inches=1.4,
)

# %%
pd.DataFrame(
    {
        "before": world.judge(before)["object"],
        "after": world.judge(after)["object"],
    },
    index=pd.Index(asked, name="object seen"),
)

# %% [markdown]
# ## For the record
#
# What [](../book/paper_versus_here.md) quotes from this chapter.

# %%
gone, kept = found["efficacy"], found["specificity"]
works = [name for name in by_layer if gone[name] >= 0.8]
last = "layer 0, last token"


def told(name: str) -> str:
    """One line of what an edit did."""
    return f"style gone in {gone[name]:.0%}, the rest kept in {kept[name]:.0%}"


record = {
    "qf_model": model,
    "qf_layers": f"works in {', '.join(works) or 'no layer'} of {len(encoder)}",
    "qf_layers_status": "reproduced"
    if works == ["layer 0"]
    else "not reproduced",
    "qf_last": told(last),
    "qf_last_status": "reproduced"
    if gone[last] >= 0.8
    else "not reproduced",
    "qf_eos": told("layer 0"),
}
for key, value in record.items():
    glue(key, value, display=False)
pd.Series(record, name="value").to_frame()
