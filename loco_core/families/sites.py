"""The sites of causal tracing: places whose activation can be restored (arXiv 2310.13730, sec. 3).

In the denoiser: the output of every ResNet block, self-attention, cross-attention and feed-forward,
in the order in which they run (70 in Stable Diffusion 1 and 2, 227 in SD-XL). In the text encoders:
the output of the self-attention and of the MLP of every layer, token by token.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .checks import whole_number

__all__ = [
    "KINDS",
    "PARTS",
    "Site",
    "adjacent",
    "kind_around",
    "selected",
    "site_kind",
    "text_sites",
]

KINDS = {
    "resnets": "ResNet",
    "attn1": "self-attention",
    "attn2": "cross-attention",
    "ff": "feed-forward",
}
PARTS = {"self_attn": "self-attention", "mlp": "MLP"}


@dataclass(frozen=True)
class Site:
    """One place. name: of the module, below the denoiser or, for a text encoder, below the
    pipeline. kind: what the module is. token: in a text encoder the position from the subject's
    last token on (0 is that token, 1 the one after it), else None: the whole output.
    """

    name: str
    kind: str
    token: int | None = None

    @classmethod
    def of(cls, label: str) -> "Site":
        """The site with this `label`. Raises ValueError for what is no label of a site.

        >>> Site.of("text_encoder.encoder.layers.0.mlp @-1").token
        -1
        """
        name, _, token = label.partition(" @")
        parts = KINDS if not token else PARTS
        kind = site_kind(name) if not token else PARTS.get(name.rpartition(".")[2])
        if kind is None or not re.fullmatch(r"(-?\d+)?", token):
            raise ValueError(
                f"there is no site {label!r}: it is a module ({', '.join(parts)}), and in a text "
                'encoder a token, as in "text_encoder.encoder.layers.0.mlp @0"'
            )
        return cls(name, kind, int(token) if token else None)

    @property
    def label(self) -> str:
        """The name, and the token if there is one: "text_encoder.encoder.layers.0.mlp @0"."""
        return self.name if self.token is None else f"{self.name} @{self.token}"

    @property
    def track(self) -> tuple[str, int | None]:
        """Sites of one track lie behind each other: all of a denoiser, or one kind and token of a
        text encoder."""
        return ("" if self.token is None else re.sub(r"\.\d+\.", ".", self.name), self.token)

    @property
    def block(self) -> str:
        """The part of a denoiser that it lies in, in short: "down 1", "mid", "up 2"."""
        found = re.match(r"(\w+)_blocks\.(\d+)|(\w+?)_block\b", self.name)
        if found is None:
            return self.name.partition(".")[0]
        return found[3] or f"{found[1]} {found[2]}"

    @property
    def layer(self) -> tuple[str, int]:
        """The text encoder, and the number of its layer: ("text_encoder", 0).

        Raises ValueError for a site of the denoiser.
        """
        if self.token is None:
            raise ValueError(f"site {self.label} is of the denoiser and has no layer: see .block")
        path, index, _ = self.name.rsplit(".", 2)
        return path.partition(".")[0], int(index)


def site_kind(name: str) -> str | None:
    """The kind of the site that the module `name` of a denoiser is; None: it is none.

    >>> site_kind("mid_block.resnets.1"), site_kind("mid_block.resnets.1.conv1")
    ('ResNet', None)
    """
    found = re.search(r"(?:^|\.)(?:(resnets)\.\d+|(attn1|attn2|ff))$", name)
    return KINDS[found[1] or found[2]] if found else None


def kind_around(name: str) -> str | None:
    """The kind of the site that the module `name` of a denoiser lies in; None: in none.

    >>> kind_around("mid_block.resnets.1.conv1"), kind_around("mid_block.resnets.1")
    ('ResNet', None)
    """
    found = re.search(r"(?:^|\.)(?:(resnets)\.\d+|(attn1|attn2|ff))\.", name)
    return KINDS[found[1] or found[2]] if found else None


def text_sites(encoders: Mapping[str, nn.ModuleList], offsets: Sequence[int]) -> tuple[Site, ...]:
    """The sites of text encoders: by encoder, layer, self-attention then MLP, token.

    encoders: their layers, by path. offsets: tokens, counted from the subject's last one.
    Raises ValueError for a layer without such parts.
    """
    found = []
    for path, layers in encoders.items():
        for index, layer in enumerate(layers):
            for part, kind in PARTS.items():
                if not hasattr(layer, part):
                    raise ValueError(
                        f"{path}.{index} has no {part}: only CLIP text encoders are traced"
                    )
                found += [Site(f"{path}.{index}.{part}", kind, token) for token in offsets]
    return tuple(found)


def selected(sites: Sequence[Site], names: Sequence[str] | None) -> tuple[Site, ...]:
    """The sites with one of these names or labels, in their own order; all without names."""
    if names is None:
        return tuple(sites)
    names = [names] if isinstance(names, str) else list(names)
    known = {site.name for site in sites} | {site.label for site in sites}
    if not names or not known.issuperset(names):
        wrong = next((name for name in names if name not in known), None)
        raise ValueError(
            f"there is no site {wrong!r}; choose from the {len(sites)} sites "
            f"{sites[0].label}, ..., {sites[-1].label}"
        )
    return tuple(site for site in sites if site.name in names or site.label in names)


def adjacent(sites: Sequence[Site], window: int) -> tuple[tuple[Site, ...], ...]:
    """Windows of `window` sites that lie behind each other, ordered by their first site."""
    tracks: dict[tuple, list[Site]] = {}
    for site in sites:
        tracks.setdefault(site.track, []).append(site)
    most = min(map(len, tracks.values()))
    size = whole_number(window, 1, most)
    if size is None:
        raise ValueError(
            f"window {window!r} does not fit: {most} sites lie behind each other here, so choose "
            f"a whole number from 1 to {most}"
        )
    order = {site: i for i, site in enumerate(sites)}
    found = [
        tuple(track[i : i + size])
        for track in tracks.values()
        for i in range(len(track) - size + 1)
    ]
    return tuple(sorted(found, key=lambda group: order[group[0]]))
