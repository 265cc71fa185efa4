"""Figures: the score of every window, the effect of every site, and images side by side.

Functions return a matplotlib Figure that is already closed in pyplot, so that a notebook shows it
once, as the value of its cell.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from ..families import Site
from ..painting import Images
from .pixels import eight_bit

CURVE, FOUND, TRUTH = sns.color_palette("colorblind", 3)


def score_curve(
    scores: ArrayLike,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    *,
    found: int | None = None,
    planted: int | None = None,
    ylabel: str = "CLIP-Score",
    title: str = "",
) -> Figure:
    """Score a_j against window start j, LocoGen's figure (arXiv 2405.01008, section 4).

    scores: [window], the mean over prompts and seeds; low, high: [window], the 95 % interval, drawn
    as a band. found: the window LocoGen chose; planted: the window that holds the truth.

        figure = score_curve([30.0, 21.5, 29.8], [29, 20, 29], [31, 23, 31], found=1)
    """
    a = _vector("scores", scores)
    with sns.axes_style("whitegrid"):
        figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    window = np.arange(len(a))
    if (low is None) != (high is None):
        raise ValueError("score_curve: give both low and high, the ends of the interval")
    if low is not None and high is not None:
        band = _vector("low", low, len(a)), _vector("high", high, len(a))
        axis.fill_between(window, *band, color=CURVE, alpha=0.2, label="95 % interval")
    axis.plot(window, a, color=CURVE, marker="o", label="mean")
    for value, color, line, name in (
        (planted, TRUTH, "-", "planted"),
        (found, FOUND, "--", "found"),
    ):
        if value is None:
            continue
        if not 0 <= value < len(a):
            raise ValueError(f"score_curve: {name}={value} is not a window; choose 0..{len(a) - 1}")
        axis.axvline(value, color=color, linestyle=line, label=f"{name}: {value}")
    axis.set(xlabel="window (index of its first text layer)", ylabel=ylabel, title=title)
    axis.set_xticks(_thinned(window, 20))
    axis.legend(loc="best")
    plt.close(figure)
    return figure


def image_grid(
    images: ArrayLike | Images,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    *,
    title: str = "",
    inches: float = 1.0,
) -> Figure:
    """Labelled images: [row, column, 3, H, W], uint8 or in [0, 1] (or [column, 3, H, W]: one row).

    Pixels stay crisp: an image is enlarged by whole blocks, never smoothed.

        figure = image_grid(np.zeros((2, 3, 3, 64, 64)), rows=["before", "after"])
    """
    grid = eight_bit(images)
    grid = grid[None] if grid.ndim == 4 else grid
    if grid.ndim != 5:
        raise ValueError(
            f"image_grid: expected [row, column, 3, H, W] or [column, 3, H, W], got {grid.shape}"
        )
    count_rows, count_columns = grid.shape[:2]
    for name, labels, count in (("rows", rows, count_rows), ("columns", columns, count_columns)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"image_grid: {len(labels)} {name} labels for {count} {name}")
    size = (count_columns * inches + (1.2 if rows else 0), count_rows * inches + 0.5)
    figure, axes = plt.subplots(
        count_rows, count_columns, figsize=size, squeeze=False, layout="constrained"
    )
    for (row, column), axis in np.ndenumerate(axes):
        axis.imshow(grid[row, column].transpose(1, 2, 0), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if rows and column == 0:
            axis.set_ylabel(rows[row], rotation=0, ha="right", va="center", fontsize=8)
        if columns and row == 0:
            axis.set_title(columns[column], fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    plt.close(figure)
    return figure


def _vector(name: str, values: ArrayLike, length: int | None = None) -> NDArray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector) or (length is not None and len(vector) != length):
        expected = "a non-empty vector" if length is None else f"{length} values, one per window"
        raise ValueError(f"score_curve: {name} has shape {vector.shape}, expected {expected}")
    return vector


def effect_figure(trace: Any, threshold: float | None = None, *, title: str = "") -> Figure:
    """Effects of a causal trace (arXiv 2310.13730, section 3): bars along a denoiser, each with its
    95 % interval; for text encoders a map of layer and token for each kind of site, or of layer
    and kind if a single token was traced.

    trace: a `CausalTrace`. threshold: drawn as a line, in a map as a mark on the causal sites.

        figure = effect_figure(loco.trace(pipe, concept, "text_encoder", tokens="all"))
    """
    frame = trace.to_frame()
    draw = _effect_bars if trace.where == "denoiser" else _effect_maps
    with sns.axes_style("whitegrid" if trace.where == "denoiser" else "white"):
        figure = draw(frame, threshold)
    if title:
        figure.suptitle(title, fontsize=10)
    plt.close(figure)
    return figure


def _effect_bars(frame: Any, threshold: float | None) -> Figure:
    figure, axis = plt.subplots(figsize=(8, 3.8), layout="constrained")
    kinds = list(dict.fromkeys(frame["kind"]))
    for kind, color in zip(kinds, sns.color_palette("colorblind", len(kinds)), strict=True):
        part = frame[frame["kind"] == kind]
        ends = part["effect"] - part["low"], part["high"] - part["effect"]
        axis.bar(
            part.index, part["effect"], yerr=np.clip(ends, 0, None), width=1, edgecolor="none",
            color=color, ecolor="0.4", error_kw={"elinewidth": min(1.2, 90 / len(frame))},
            label=kind,
        )  # fmt: skip
    if threshold is not None:
        axis.axhline(threshold, color="black", linestyle="--", label=f"threshold: {threshold:.3g}")
    block = frame["site"].map(lambda name: Site(name, "").block)
    starts = block.drop_duplicates().index.to_numpy()
    for start in starts[1:]:
        axis.axvline(start - 0.5, color="0.8", linewidth=1, zorder=0)
    middles = (starts + np.append(starts[1:], len(frame)) - 1) / 2
    axis.set_xticks(middles, block[starts])
    axis.grid(False, axis="x")
    axis.set(xlabel="block, its sites in the order they run", xlim=(-1, len(frame)))
    axis.set_ylabel("effect (restored - corrupted)")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def _effect_maps(frame: Any, threshold: float | None) -> Figure:
    kinds = list(dict.fromkeys(frame["kind"]))
    places = [Site(name, "", 0).layer for name in frame["site"]]
    encoders = {encoder for encoder, _ in places}
    layer = [str(n) if len(encoders) == 1 else f"{encoder} {n}" for encoder, n in places]
    order, most = list(dict.fromkeys(layer)), frame["effect"].abs().max()
    frame, tokens = frame.assign(layer=layer), list(frame["token"].unique())
    if len(tokens) == 1:  # the kinds side by side
        label, parts, across = f"at token {tokens[0]} (0: last of the subject)", {"": frame}, "kind"
    else:
        label, across = "token (0: last of the subject)", "token"
        parts = {kind: frame[frame["kind"] == kind] for kind in kinds}
    row = 0.3 if len(order) <= 20 else 0.15
    size = (7 if len(tokens) > 1 else 5, 0.6 + len(parts) * (0.9 + row * len(order)))
    figure, axes = plt.subplots(len(parts), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, (title, part) in zip(axes[:, 0], parts.items(), strict=True):
        table = part.pivot(index="layer", columns=across, values="effect").loc[
            [each for each in order if each in set(part["layer"])]
        ]
        table = table[kinds] if across == "kind" else table
        marks = None if threshold is None else np.where(table >= threshold, "*", "")
        sns.heatmap(
            table, ax=axis, cmap="vlag", vmin=-most, vmax=most, annot=marks, fmt="", cbar=False,
            xticklabels=False, yticklabels=False,
        )  # fmt: skip
        for ticks, labels in ((axis.set_xticks, table.columns), (axis.set_yticks, table.index)):
            shown = _thinned(np.arange(len(labels)), 24)
            ticks(shown + 0.5, labels[shown], rotation=0)
        axis.set(title=title, xlabel="", ylabel="layer" if len(encoders) == 1 else "")
    axes[-1, 0].set_xlabel(label)
    figure.colorbar(
        axes[0, 0].collections[0], ax=axes[:, 0], label="effect (restored - corrupted)",
        fraction=0.04, shrink=min(1, 4 / size[1]),
    )  # fmt: skip
    return figure


def _thinned(ticks: NDArray, most: int) -> NDArray:
    """Every n-th of the ticks, so that at most `most` are labelled."""
    return ticks[:: -(-len(ticks) // most)]
