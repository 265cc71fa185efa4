"""The sites of causal tracing: places whose activation can be restored (arXiv 2310.13730, sec. 3).

In the denoiser: the output of every ResNet block, self-attention, cross-attention and feed-forward,
in the order in which they run (70 in Stable Diffusion 1 and 2, 227 in SD-XL). In the text encoders:
the output of the self-attention and of the MLP of every layer, token by token.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .._progress import bar
from ..families import family_of
from ..interventions.routing import refuse_compiled
from ..painting.paint import own_scheduler, sample_batch

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

    @property
    def label(self) -> str:
        """The name, and the token if there is one: "text_encoder.encoder.layers.0.mlp @0"."""
        return self.name if self.token is None else f"{self.name} @{self.token}"

    @property
    def track(self) -> tuple[str, int | None]:
        """Sites of one track lie behind each other: all of a denoiser, or one kind and token of a
        text encoder."""
        return ("" if self.token is None else re.sub(r"\.\d+\.", ".", self.name), self.token)


def record_sites(denoiser: nn.Module, run: Callable[[], object]) -> tuple[Site, ...]:
    """The sites of `denoiser` in the order in which `run()` calls them.

    Raises ValueError if it has none.

        record_sites(unet, lambda: unet(latents, 0, encoder_hidden_states=text))
    """
    seen: dict[str, str] = {}

    def note(name: str, kind: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            seen.setdefault(name, kind)

        return hook

    handles = []
    for name, module in denoiser.named_modules():
        if found := re.search(r"(?:^|\.)(?:(resnets)\.\d+|(attn1|attn2|ff))$", name):
            kind = KINDS[found[1] or found[2]]
            handles.append(module.register_forward_pre_hook(note(name, kind)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError(
            f"{type(denoiser).__name__} has no site that ran (resnets.*, attn1, attn2, ff): "
            'only UNets are traced; where="text_encoder" may still work'
        )
    return tuple(Site(name, kind) for name, kind in seen.items())


def unet_sites(pipe: Any) -> tuple[Site, ...]:
    """The sites of a pipeline's UNet, recorded in one step of sampling.

    len(unet_sites(loco.load("mini-sd")))  # 65
    """
    model = family_of(pipe)
    denoiser = model.denoiser
    refuse_compiled(denoiser)
    text = model.encode([""])
    with own_scheduler(pipe), bar(1, "recording sites", "step") as progress:
        return record_sites(
            denoiser, lambda: sample_batch(pipe, text, text, text, [0], None, 1, 1.0, 0.0, progress)
        )


def text_sites(
    pipe: Any, prompts: Sequence[str], subject: str, tokens: str = "last"
) -> tuple[Site, ...]:
    """The sites of all text encoders: by encoder, layer, self-attention then MLP, token.

    tokens: "last", the subject's last token; or "all": from the first token that every prompt has
    before its subject to the end-of-text token of the prompt that ends latest. Tokens are counted
    from the subject's last one, so that prompts of different lengths line up.
    """
    if tokens not in ("last", "all"):
        raise ValueError(f'tokens={tokens!r}: choose "last" or "all"')
    model, offsets = family_of(pipe), range(1)
    if tokens == "all":
        last = [model.subject_span(prompt, subject)[1] for prompt in prompts]
        ids = model.tokenize(prompts)
        end = (ids == model.tokenizer.eos_token_id).int().argmax(1).tolist()
        after = max(e - at for e, at in zip(end, last, strict=True))
        offsets = range(-min(last), min(after, ids.shape[1] - 1 - max(last)) + 1)
    found = []
    for path, layers in model.text_encoders.items():
        for index, layer in enumerate(layers):
            for part, kind in PARTS.items():
                if not hasattr(layer, part):
                    raise ValueError(
                        f"{path}.{index} has no {part}: only CLIP text encoders are traced"
                    )
                found += [Site(f"{path}.{index}.{part}", kind, token) for token in offsets]
    return tuple(found)


def module_of(pipe: Any, site: Site) -> nn.Module:
    """The module whose output is the site."""
    if site.token is None:
        return family_of(pipe).denoiser.get_submodule(site.name)
    path, index, part = site.name.rsplit(".", 2)
    return getattr(family_of(pipe).text_encoders[path][int(index)], part)


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
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= most:
        raise ValueError(
            f"window {window!r} does not fit: {most} sites lie behind each other here, so choose "
            f"a whole number from 1 to {most}"
        )
    order = {site: i for i, site in enumerate(sites)}
    found = [
        tuple(track[i : i + window])
        for track in tracks.values()
        for i in range(len(track) - window + 1)
    ]
    return tuple(sorted(found, key=lambda group: order[group[0]]))
