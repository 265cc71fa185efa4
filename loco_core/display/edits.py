"""Figures of edits: which keys interfere, and what an edit buys for what it costs.

Functions return a matplotlib Figure that is already closed in pyplot, as those of `plots`.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

__all__ = ["interference_map", "trade_off"]


def interference_map(gram: ArrayLike, labels: Sequence[str], *, title: str = "") -> Figure:
    """The cosines between keys, [row, row], as a heat map: the Gram matrix of `loco.diagnose`.

    labels: one per row. 1 is the same direction: an edit of one row moves the other as much.

        interference_map([[1.0, 0.4], [0.4, 1.0]], ["Monet", "Van Gogh"])
    """
    cosines = np.asarray(gram, dtype=np.float64)
    if cosines.ndim != 2 or cosines.shape != (len(labels),) * 2:
        raise ValueError(
            f"interference_map: a square matrix with a label per row is needed, got "
            f"{cosines.shape} and {len(labels)} labels"
        )
    size = 1.6 + 0.5 * len(labels)
    figure, axis = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
    sns.heatmap(
        cosines,
        vmax=1,
        cmap="rocket_r",
        annot=True,
        fmt=".2f",
        annot_kws={"size": 7},
        square=True,
        xticklabels=labels,
        yticklabels=labels,
        cbar_kws={"label": "cosine between keys"},
        ax=axis,
    )
    axis.tick_params(axis="x", rotation=45)
    plt.setp(axis.get_xticklabels(), ha="right", rotation_mode="anchor")
    axis.set_title(title)
    plt.close(figure)
    return figure


def trade_off(
    frame: Any,
    *,
    erased: str = "efficacy",
    kept: str = "specificity",
    xlabel: str = "everything else is kept",
    ylabel: str = "the concept is gone",
    title: str = "",
) -> Figure:
    """A point per method: what is erased against what is kept, the best in the upper right corner.

    frame: a pandas table, a row per method, such as `Evaluation.summary()`; erased, kept: its
    columns, shares in [0, 1]. Columns of the same names with " low" and " high" are drawn as bars.

        trade_off(loco.evaluate(pipe, edits, concept).summary())
    """
    missing = [column for column in (erased, kept) if column not in frame]
    if missing:
        raise ValueError(
            f"trade_off: no column {missing[0]!r}; the table has {', '.join(map(str, frame))}"
        )
    with sns.axes_style("whitegrid"):
        figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    palette = sns.color_palette("colorblind", len(frame))
    markers = "osD^vP*Xph<>"
    for i, (name, row) in enumerate(frame.iterrows()):
        bars = {}
        for side, column in (("xerr", kept), ("yerr", erased)):
            if f"{column} low" in frame:
                ends = row[column] - row[f"{column} low"], row[f"{column} high"] - row[column]
                bars[side] = np.clip(ends, 0, None)[:, None]
        # hollow and ever smaller: points that coincide are all seen
        axis.errorbar(
            row[kept], row[erased], **bars, color=palette[i], marker=markers[i % len(markers)],
            markersize=16 - 10 * i / len(frame), markerfacecolor="none", markeredgewidth=2,
            linestyle="none", elinewidth=0.8, alpha=0.9, label=str(name),
        )  # fmt: skip
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title, ylim=(-0.04, 1.04))
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelspacing=1.2)
    plt.close(figure)
    return figure
