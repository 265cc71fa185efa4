"""What a family of pipelines must tell the other wings.

A family is the only place that knows how one kind of diffusers pipeline is built: where text
enters, in which order the text layers run, how a prompt becomes embeddings, and how the pipeline
lays out its batch. The other wings ask `family_of(pipe)`, a `Model`, and hold no module name of
their own.

To add a family: one file with a subclass of `Model`, and one line in `families/__init__.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from .checks import plain_module, refuse_fused, whole_number
from .running import Run, plain
from .sites import Site, text_sites
from .subject import span_of
from .text import TextLayer, TextStates, checked_prompts

__all__ = ["Model", "checked_prompts", "plain"]


class Model(ABC):
    """A family bound to one of its pipelines: the questions a family answers, see the methods.

    pipe: the pipeline. name: of the family. component: the denoiser's name in `pipe.components`.
    pooled: whether the denoiser is also handed a pooled embedding of the prompt, which reaches it
    beside the text layers and so is not routed with them. refuses: what cannot be done with a
    pipeline of this family, and why: ability -> reason.
    """

    name: str
    component: str = "unet"
    pooled: bool = False
    refuses: Mapping[str, str] = {}

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {type(self.pipe).__name__}>"

    # --- what a family answers for itself -----------------------------------------------------

    @classmethod
    @abstractmethod
    def owns(cls, pipe: Any) -> bool:
        """Whether `pipe` is of this family (subclasses of its pipeline class included)."""

    @abstractmethod
    def run(self) -> Run:
        """The text layers and sites of the denoiser, in the order in which they run."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> TextStates:
        """Text states of `prompts` as the pipeline itself would make them."""

    @abstractmethod
    def kv(self, layer: TextLayer) -> dict[str, nn.Linear]:
        """The projections of `layer` that read text, by their names below the attention module."""

    @abstractmethod
    def conditional_rows(self, rows: int, guidance: float) -> Int64[Tensor, " row"]:
        """Where the `rows` prompts of a call sit in the denoiser's batch: [rows] long."""

    @property
    @abstractmethod
    def text_encoders(self) -> dict[str, nn.ModuleList]:
        """The transformer layers of each text encoder, by the name of its path from the pipeline
        down ("text_encoder.encoder.layers"), in the order in which they run."""

    @abstractmethod
    def call(
        self,
        rows: TextStates,
        negative: TextStates,
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        eta: float = 0.0,
        size: tuple[int, int] | None = None,
        tick: Callable[[], object] | None = None,
    ) -> Float32[Tensor, "row 3 height width"]:
        """Pictures of encoded prompts, [row, 3, H, W] in [0, 1] on the CPU, in one call of the
        pipeline. See `LatentModel.call`."""

    @abstractmethod
    def latents(
        self,
        rows: TextStates,
        negative: TextStates,
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance: float,
    ) -> Float[Tensor, "row channel height width"]:
        """What the denoiser has made of encoded prompts after the last step, on the pipeline's
        device: as `call`, undecoded. generators: of the rows, on the CPU."""

    @abstractmethod
    def encoded(
        self, images: Float[Tensor, "image 3 height width"]
    ) -> Float[Tensor, "image channel y x"]:
        """Images in [0, 1] as the denoiser knows them: the inverse of decoding `latents`."""

    # --- what follows from that -----------------------------------------------------------------

    @property
    def denoiser(self) -> nn.Module:
        """The network that is called at every step."""
        return getattr(self.pipe, self.component)

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, also if its weights wait elsewhere (CPU offload)."""
        return torch.device(self.pipe._execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's weights."""
        return plain(self.denoiser).dtype

    @property
    def text_layers(self) -> tuple[TextLayer, ...]:
        """Text layers in execution order, recorded by running the denoiser once without weights."""
        return self.run().text_layers

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites of the denoiser in execution order, recorded in the same run.

        Raises ValueError if it has none.

        len(family_of(loco.load("mini-sd")).sites)  # 65
        """
        if not (sites := self.run().sites):
            raise ValueError(
                f"{type(plain(self.denoiser)).__name__} has no site that ran (resnets.*, attn1, "
                'attn2, ff): only UNets are traced; where="text_encoder" may still work'
            )
        return sites

    def module_of(self, site: Site) -> nn.Module:
        """The module whose output is the site. Raises ValueError if this pipeline has none."""
        try:
            if site.token is None:
                return self.denoiser.get_submodule(site.name)
            path, index, part = site.name.rsplit(".", 2)
            return getattr(self.text_encoders[path][int(index)], part)
        except (AttributeError, KeyError, IndexError, ValueError):
            raise ValueError(
                f"this {type(self.pipe).__name__} has no site {site.label!r}: take sites from "
                "family_of(pipe).sites or .text_sites(...) of this pipeline"
            ) from None

    def text_sites(
        self, prompts: Sequence[str], subject: str, tokens: str = "last"
    ) -> tuple[Site, ...]:
        """The sites of all text encoders: by encoder, layer, self-attention then MLP, token.

        tokens: "last", the subject's last token; or "all": from the first token that every prompt
        has before its subject to the end-of-text token of the prompt that ends latest. Tokens are
        counted from the subject's last one, so that prompts of different lengths line up.
        """
        if tokens not in ("last", "all"):
            raise ValueError(f'tokens={tokens!r}: choose "last" or "all"')
        offsets = range(1)
        if tokens == "all":
            last = [self.subject_span(prompt, subject)[1] for prompt in prompts]
            ids = self.tokenize(prompts)
            end = (ids == self.tokenizer.eos_token_id).int().argmax(1).tolist()
            after = max(e - at for e, at in zip(end, last, strict=True))
            offsets = range(-min(last), min(after, ids.shape[1] - 1 - max(last)) + 1)
        return text_sites(self.text_encoders, offsets)

    def text_projections(self, layer: int = 0) -> list[str]:
        """Weight names of the output projection of self-attention `layer` of every text encoder.

        Raises ValueError for a layer that an encoder does not have, or that has no `out_proj`.
        """
        names = []
        for path, layers in self.text_encoders.items():
            index = whole_number(layer, 0, len(layers) - 1)
            if index is None:
                raise ValueError(
                    f"layer {layer!r} is not in {path}: choose from 0 to {len(layers) - 1}"
                )
            attention = getattr(layers[index], "self_attn", None)
            if not hasattr(attention, "out_proj"):
                raise ValueError(
                    f"{path}.{index} has no self_attn.out_proj: only CLIP text encoders have one"
                )
            names.append(f"{path}.{index}.self_attn.out_proj.weight")
        return names

    @property
    def embeddings(self) -> dict[str, nn.Embedding]:
        """The table of word embeddings of each text encoder, by the name of its component."""
        components = dict.fromkeys(path.partition(".")[0] for path in self.text_encoders)
        return {x: plain(getattr(self.pipe, x)).get_input_embeddings() for x in components}

    def reads(self, weight: str) -> Literal["prompt", "layer", "step"]:
        """What a weight is handed, by what that depends on.

        weight: its name from the pipeline down. "prompt": the encoded prompts, as they are, at
        every text layer and step; "layer": an activation of a text encoder, known once the prompts
        are encoded; "step": an activation of this image, at this step or decoded.

        family_of(pipe).reads("text_encoder.encoder.layers.0.self_attn.out_proj.weight")  # "layer"
        """
        component, _, path = weight.partition(".")
        if component != self.component:
            return "layer" if component.startswith("text_encoder") else "step"
        attention, _, projection = path.removesuffix(".weight").rpartition(".")
        layers = {layer.name: layer for layer in self.text_layers}
        text = attention in layers and projection in self.kv(layers[attention])
        return "prompt" if text else "step"

    def lora_key(self, weight: str) -> str | None:
        """The name of a weight in a LoRA file of kohya's convention, which other programs read, or
        None where that convention has none.

        weight: its name from the pipeline down. Without the ending (".lora_down.weight", ...).
        """
        return None

    def lora_also(self, weights: Collection[str]) -> set[str]:
        """Other weights without which some program overlooks one of these in such a file."""
        return set()

    def unprompted(self, empty: TextStates) -> TextStates:
        """What the pipeline pushes away from if it is given no negative prompt at all.

        empty: the encoded empty prompt, which is the answer of most families.
        """
        return empty

    @property
    def tokenizer(self) -> Any:
        """The tokenizer whose positions `TextStates.embeds` has."""
        return self.pipe.tokenizer

    def attention(self, layer: TextLayer) -> nn.Module:
        """The attention module of `layer`; refuses one whose projections were fused."""
        try:
            module = self.denoiser.get_submodule(layer.name)
        except AttributeError:
            raise ValueError(
                f"the denoiser has no module {layer.name!r} (text layer {layer.index}): "
                "take layers from loco.text_layers(pipe) of this pipeline"
            ) from None
        refuse_fused(module, f"text layer {layer.index} ({layer.name})")
        return module

    def linear(self, layer: TextLayer, name: str) -> nn.Linear:
        """The projection `name` of `layer`; refuses one that was replaced, wrapped or quantised."""
        where = f"{name} of text layer {layer.index} ({layer.name})"
        module = plain_module(self.attention(layer), name, where, values=False)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{where} is {type(module).__name__}: only an nn.Linear reads text")
        return module

    def tokenize(self, prompts: Sequence[str]) -> Int64[Tensor, "prompt token"]:
        """Token ids, padded and cut as the pipeline does: [prompt, token] long, on the CPU."""
        return self.tokenizer(
            [self._worded(p) for p in checked_prompts(prompts)],
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def subject_span(self, prompt: str, subject: str) -> tuple[int, int]:
        """(first, last) token positions of `subject` in `prompt`, both inclusive: the last place
        where it stands as whole words, without regard to case. Errors as `subject.span_of`.

        first, last = family_of(pipe).subject_span("a house by Van Gogh", "Van Gogh")  # (4, 5)
        """
        return span_of(prompt, subject, self.tokenizer, self._worded)

    def _worded(self, prompt: str) -> str:
        """The prompt as its tokenizer gets it (textual inversions spelled out)."""
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        return prompt if convert is None else convert(prompt, self.tokenizer)
