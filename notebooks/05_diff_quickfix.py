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
count = 7  # held-out captions per question
steps = 8  # of the scheduler, for each picture
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
edit = loco.diff_quickfix(pipe, concept, lam, tokens="eos", preserve=spare)
edit

# %% [markdown]
# One weight changes:

# %%
loco.diagnose(pipe, edit).to_frame().round(2)

# %% [markdown]
# ## Which layer?
#
# The paper's claim is about a place: the first self-attention layer, and no other.
# Here is the same edit in every layer of the text encoder, asked on captions it
# was not made from.

# %%
probes = [
    probe
    for probe in world.probes("style", artist, count, exclude={*concept.prompts, *spare})
    if probe.group in ("efficacy", "specificity: others", "specificity: same image")
]


def shares(edits: dict[str, loco.Edit], pipe=pipe) -> pd.DataFrame:
    """Per edit: in how many pictures the style is gone, and how much else is kept."""
    found = loco.evaluate(pipe, edits, concept, probes=probes, seeds=[0], steps=steps)
    return found.summary()[["efficacy", "specificity"]]


depth = len(next(iter(loco.family_of(pipe).text_encoders(pipe).values())))
by_layer = shares(
    {
        f"layer {layer}": loco.diff_quickfix(
            pipe, concept, lam, layer=layer, tokens="eos", preserve=spare
        )
        for layer in range(depth)
    }
)
by_layer.map("{:.0%}".format)

# %% [markdown]
# ## Which tokens?
#
# The paper edits the last token of the subject. Then the style is still known to
# whatever comes after it; the end of the text, above all, which the layers of
# this model read. More tokens remove more.

# %%
by_tokens = shares(
    {
        "last, as published (0.01, nothing preserved)": loco.diff_quickfix(
            pipe, concept, lam=0.01, tokens="last"
        ),
        **{
            tokens: loco.diff_quickfix(pipe, concept, lam, tokens=tokens, preserve=spare)
            for tokens in ("last", "eos", "following")
        },
    }
)
by_tokens.map("{:.0%}".format)

# %% [markdown]
# ## One edit, every denoiser
#
# The natural twin shares the text encoder, and nobody planted anything in it. The
# same edit serves it, without any layer having been located. That is the strength
# of this place, and its weakness: whoever shares the encoder shares the edit.

# %%
twin = loco.load(natural, dtype=getattr(torch, dtype))
by_model = pd.concat(
    {model: shares({"edit": edit}), natural: shares({"edit": edit}, twin)}, names=["model"]
)
by_model.map("{:.0%}".format)

# %% [markdown]
# ## A whole object
#
# The paper also removes objects as such, by mapping them to "a". Here the target
# is "a thing", which Shapeland draws as a plain disc.

# %%
whole = world.concept("object", thing, prompts=prompts)
rest = [name for name in world.ATTRIBUTES["object"] if name != thing]
no_thing = loco.diff_quickfix(
    pipe, whole, lam, tokens="eos", preserve=[*whole.neutral, *whole.renamed(rest)]
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
    columns=[caption.replace(" in the ", "\nin the ") for caption in asked],
    inches=1.4,
)

# %%
pd.DataFrame(
    {"before": world.judge(before)["object"], "after": world.judge(after)["object"]},
    index=pd.Index(asked, name="object seen"),
)

# %% [markdown]
# ## For the record
#
# What [](../book/paper_versus_here.md) quotes from this chapter.

# %%
works = [name for name, gone in by_layer["efficacy"].items() if gone >= 0.8 and name != "no edit"]
record = {
    "qf_model": model,
    "qf_layers": f"removes the style in {', '.join(works) or 'no layer'} of {depth}",
    "qf_layers_status": "reproduced" if works == ["layer 0"] else "not reproduced",
    "qf_last": f"gone in {by_tokens['efficacy'].iloc[1]:.0%} of {count} pictures, "
    f"everything else kept in {by_tokens['specificity'].iloc[1]:.0%}",
    "qf_last_status": "reproduced" if by_tokens["efficacy"].iloc[1] >= 0.8 else "not reproduced",
    "qf_eos": f"gone in {by_tokens.loc['eos', 'efficacy']:.0%} of {count} pictures, "
    f"everything else kept in {by_tokens.loc['eos', 'specificity']:.0%}",
}
for key, value in record.items():
    glue(key, value, display=False)
pd.Series(record, name="value").to_frame()
