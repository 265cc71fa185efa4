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
# # LocoEdit: change the layers
#
# LocoGen said where a style enters. LocoEdit {cite:p}`basu2024mechanistic`
# changes the weights there, so that the artist's name is read as if it were not
# there. One small linear system, no training.

# %% tags=["parameters"]
model = "mini-sd"
artist = "Mira Holt"  # the style to remove
window = 2  # layers that read the neutral prompt together
swept = 4  # prompts of the sweep; with the seeds at least 5 pictures
prompts = 12  # prompts the edit is made from
seeds = 2  # pictures per prompt
steps = 8  # of the scheduler, for each picture
lam = 20.0  # price of changing the weights, in units of squared key length (here 128)
dtype = "float64"  # the same picture on every CPU; float32 is faster

# %%
import tempfile
import warnings
from pathlib import Path

import pandas as pd
import torch
from myst_nb import glue

import loco_core as loco
from loco_core.display import edit_explorer, image_grid, one_of

world = loco.shapeland
loco.progress(False)
pipe = loco.load(model, dtype=getattr(torch, dtype))

# %% [markdown]
# ## The layers
#
# The sweep of the last chapter. The edit goes where the drop is largest; the test says
# whether that is more than chance.

# %%
few = world.concept("style", artist, prompts=swept)
found = loco.localize(
    pipe, few, window=window, seeds=range(seeds), steps=steps
)
layers = found.best
drop, low, high = found.test.held_back
pd.Series(
    {
        "layers": ", ".join(map(str, layers)),
        "verdict": found.test.verdict,
        "p, adjusted for all windows": f"{found.test.p[found.test.best]:.3f}",
        "drop, held back": f"{drop:.1f} ({low:.1f} to {high:.1f})",
    },
    name=artist,
).to_frame()

# %% [markdown]
# ## The edit
#
# $$
# \min_{W'} \lVert C W'^\top - G W^\top \rVert^2 + \lambda \lVert W' - W \rVert^2
# \quad\Rightarrow\quad
# W' = W + W (G - C)^\top (C C^\top + \lambda I)^{-1} C
# $$
#
# $C$ holds the embeddings of the artist's name, one row per prompt; $G$ what
# stands in their place in the neutral twins. The price $\lambda$ is in units of
# a squared row of $C$, which is 128 here. Rows can also be asked to stay: the
# twins, and the same prompts by the other artists. These settings were chosen on
# captions of the training split, and are measured here on others; what the
# paper's own do instead is measured below. Nothing is changed yet: an edit is a
# value.

# %%
concept = world.concept("style", artist, prompts=prompts)
others = [name for name in world.ATTRIBUTES["style"] if name != artist]
spare = [*concept.neutral, *concept.renamed(others)]
edit = loco.locoedit(
    pipe, concept, layers=layers, lam=lam, preserve=spare
)
edit

# %% [markdown]
# It touches the key and value weights of these layers, and each change has
# a rank of at most the number of edited rows; rows that stay add nothing to it.

# %%
weights = dict(pipe.unet.named_parameters(prefix="unet"))
pd.DataFrame(
    {
        "shape": {
            name: str(tuple(weights[name].shape))
            for name in edit.changes
        },
        "rank of the change": {
            name: change.rank for name, change in edit.changes.items()
        },
    }
).rename_axis("weight")

# %% [markdown]
# ## Before and after
#
# Prompts that the edit was not made from, the same noise before and after.

# %%
asked = [
    {"object": "tree", "color": "green", "place": "desert"},
    {"object": "crown", "color": "yellow", "place": "city"},
    {"object": "boat", "color": "purple", "place": "ocean"},
    {"object": "flower", "color": "pink", "place": "forest"},
    {"object": "heart", "color": "red", "place": "ocean"},
    {"object": "fish", "color": "orange", "place": "city"},
]
held_out = [world.caption(style=artist, **scene) for scene in asked]


def paint(prompts: list[str]) -> torch.Tensor:
    """One picture per prompt and seed, [prompt, seed, 3, H, W]."""
    return loco.generate(pipe, prompts, seeds=range(seeds), steps=steps)


before = paint(held_out)
with edit.applied(pipe):
    after = paint(held_out)

# %% mystnb={"figure": {"name": "fig-before-after", "caption": "Held-out prompts with the artist's name, before and after the edit."}, "image": {"alt": "Two rows of pictures of the same prompts: with the style before the edit, and after it", "classes": "dark-light"}}
image_grid(
    torch.stack([before[:, 0], after[:, 0]]),
    rows=["before", "after"],
    columns=[f"{scene['color']} {scene['object']}" for scene in asked],
    inches=1.4,
)


# %%
def count(images: torch.Tensor, kind: str, names: list[str]) -> int:
    """Of pictures [prompt, seed], how many show the name of their prompt."""
    answers = world.judge(images)[kind]
    each = images.shape[1]
    return sum(
        answer == names[k // each] for k, answer in enumerate(answers)
    )


def kept(
    images: torch.Tensor, scenes: list[dict[str, str]]
) -> dict[str, int]:
    """How many pictures show what their caption says, per attribute."""
    return {
        kind: count(images, kind, [s[kind] for s in scenes])
        for kind in scenes[0]
    }


scenes = [{"style": artist, **scene} for scene in asked]
total = len(scenes) * seeds
pd.DataFrame(
    {"before": kept(before, scenes), "after": kept(after, scenes)}
).rename_axis(f"shown, of {total}")

# %% [markdown]
# ## Which tokens?
#
# The paper edits the row of the last subject token. Tokens behind it have read
# the name as well: the end-of-text token, and the padding. Three choices, from
# the fewest rows to the most; the middle one is the default.

# %%
choices = {}
for tokens in ("last", "eos", "following"):
    choice = loco.locoedit(
        pipe,
        concept,
        layers=layers,
        lam=lam,
        tokens=tokens,
        preserve=spare,
    )
    with choice.applied(pipe):
        choices[tokens] = kept(paint(held_out), scenes)
pd.DataFrame(choices).T.rename_axis(
    f"tokens edited (shown, of {total})"
)

# %% [markdown]
# ## What else changes?
#
# Prompts with the *other* artists, under the edit. Nothing of theirs should go.

# %%
hosts = [asked[k % len(asked)] for k in range(len(others))]
other_scenes = [
    {"style": name, **host} for name, host in zip(others, hosts)
]
other_prompts = [world.caption(**scene) for scene in other_scenes]
other_before = paint(other_prompts)
with edit.applied(pipe):
    other_after = paint(other_prompts)


# %%
def per_artist(images: torch.Tensor) -> list[str]:
    """Per artist: of the pictures of that artist, how many show the style."""
    rows = zip(images, others)
    return [
        f"{count(row[None], 'style', [name])} of {seeds}"
        for row, name in rows
    ]


pd.DataFrame(
    {
        "before": per_artist(other_before),
        "after": per_artist(other_after),
    },
    index=pd.Index(others, name="other artist"),
)

# %%
collateral = pd.DataFrame(
    {
        "before": kept(other_before, other_scenes),
        "after": kept(other_after, other_scenes),
    }
)
collateral.rename_axis(f"shown, of {len(others) * seeds}")

# %% [markdown]
# The same without rows that stay, and with the paper's $\lambda = 0.01$: every row
# is met all but exactly, and names with similar embeddings are dragged along.

# %%
with warnings.catch_warnings(record=True) as said:
    hard = loco.locoedit(pipe, concept, layers=layers, lam=0.01)
print(
    "warned:", str(said[0].message).partition("> ")[2].partition(":")[0]
)
with hard.applied(pipe):
    hard_own, hard_others = paint(held_out), paint(other_prompts)
pd.Series(
    {
        f"shows {artist}, of {total}": kept(hard_own, scenes)["style"],
        f"shows the other artist, of {len(others) * seeds}": kept(
            hard_others, other_scenes
        )["style"],
    },
    name="lam = 0.01, nothing preserved",
).to_frame()

# %% [markdown]
# ## Your own edit
#
# Move the price. With a kernel, choose too what is asked to stay; each edit is
# solved and painted anew.

# %%
edit_explorer(
    pipe,
    concept,
    layers,
    show={
        artist: held_out[0],
        f"another by {artist}": held_out[3],
        others[0]: other_prompts[0],
        others[4]: other_prompts[4],
    },
    preserve={
        "neutral twins": concept.neutral,
        "other artists": concept.renamed(others),
    },
    lam=one_of(sorted({0.01, 1.0, lam, 100.0, 1000.0}), start=lam),
    steps=steps,
)

# %% [markdown]
# ## Undo
#
# Leaving `applied` put every weight back, bit for bit.


# %%
def bits(pipe) -> dict[str, torch.Tensor]:
    """A copy of every weight of the denoiser."""
    return {
        name: value.clone()
        for name, value in pipe.unet.state_dict().items()
    }


untouched = bits(pipe)
with edit.applied(pipe):
    inside = bits(pipe)
back = bits(pipe)
print(
    "weights that differ inside: ",
    sum(not inside[k].equal(v) for k, v in untouched.items()),
)
print(
    "weights that differ outside:",
    sum(not back[k].equal(v) for k, v in untouched.items()),
)

# %% [markdown]
# ## Keep it
#
# An edit is a few kilobytes, knows which model it is for, and is the same after
# a round trip.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "edit.safetensors"
    edit.save(path)
    print("same after a round trip:", loco.Edit.load(path) == edit)
    print("at most 64 KB:", path.stat().st_size <= 64 * 1024)

# %% [markdown]
# ## For the record
#
# What [](../book/paper_versus_here.md) quotes from this chapter.

# %%
gone = kept(before, scenes)["style"], kept(after, scenes)["style"]
same = collateral.loc["style"]
record = {
    "model_name": model,
    "erased": f"{artist} seen in {gone[0]} of {total} pictures before, {gone[1]} after",
    "erased_status": "removed"
    if gone[1] <= 0.1 * gone[0]
    else "mostly removed"
    if gone[1] <= 0.5 * gone[0]
    else "not removed",
    "spared": f"other artists seen in {same['before']} of {len(others) * seeds} before, "
    f"{same['after']} after",
    "spared_status": "spared"
    if same["after"] >= 0.97 * same["before"]
    else "not spared",
}
for key, value in record.items():
    glue(key, value, display=False)
pd.Series(record, name="value").to_frame()
