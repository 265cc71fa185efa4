"""What a family of pipelines must tell the other wings.

A family is the only place that knows how one kind of diffusers pipeline is built: where text
enters, in which order the text layers run, how a prompt becomes embeddings, and how the pipeline
lays out its batch. The other wings ask `family_of(pipe)`, a `Model`, and hold no module name of
their own.

To add a family: one file with a subclass of `Model`, and one line in `families/__init__.py`.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Int64, Shaped
from torch import Tensor, nn


@dataclass(frozen=True)
class TextLayer:
    """One place where text enters the denoiser.

    index: position in execution order, 0-based. name: path of the attention module below the
    denoiser. width: features of the text states that its K and V projections read.
    """

    index: int
    name: str
    width: int


@dataclass(frozen=True, eq=False)
class TextStates:
    """Encoded prompts. embeds: [prompt, token, width], device and dtype of the pipeline.

    tokens: ids, [prompt, token], on the CPU. mask: [prompt, token], nonzero where a token may be
    read, or None if every token is. pooled: [prompt, width] or None.
    """

    embeds: Float[Tensor, "prompt token width"]
    tokens: Int[Tensor, "prompt token"]
    mask: Shaped[Tensor, "prompt token"] | None = None
    pooled: Float[Tensor, "prompt pooled"] | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: Any) -> "TextStates":
        """Rows of the table: a slice, a list of indices or a long tensor."""
        pick: list[Any] = [None if x is None else x[rows] for x in self._fields()]
        return TextStates(*pick)

    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.embeds, self.tokens, self.mask, self.pooled


class Model(ABC):
    """A family bound to one of its pipelines: the questions a family answers, see the methods.

    pipe: the pipeline. name: of the family. pooled: whether the denoiser is also handed a pooled
    embedding of the prompt, which reaches it beside the text layers and so is not routed with them.
    """

    name: str
    pooled: bool = False

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @classmethod
    @abstractmethod
    def owns(cls, pipe: Any) -> bool:
        """Whether `pipe` is of this family (subclasses of its pipeline class included)."""

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network that is called at every step."""

    @property
    @abstractmethod
    def text_layers(self) -> tuple[TextLayer, ...]:
        """Text layers in execution order, recorded by running the denoiser once without weights."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> TextStates:
        """Text states of `prompts` as the pipeline itself would make them."""

    @abstractmethod
    def kv(self, layer: TextLayer) -> dict[str, nn.Linear]:
        """The projections of `layer` that read text, by their names below the attention module."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the noise the pipeline starts from."""

    @abstractmethod
    def inputs(self, texts: TextStates, negative: TextStates) -> dict[str, Any]:
        """Keyword arguments that hand encoded prompts to the pipeline's `__call__`."""

    @abstractmethod
    def conditional_rows(self, rows: int, guidance: float) -> Int64[Tensor, " row"]:
        """Where the `rows` prompts of a call sit in the denoiser's batch: [rows] long."""

    @property
    @abstractmethod
    def text_encoders(self) -> dict[str, nn.ModuleList]:
        """The transformer layers of each text encoder, by the name of its path from the pipeline
        down ("text_encoder.encoder.layers"), in the order in which they run."""

    def text_projections(self, layer: int = 0) -> list[str]:
        """Weight names of the output projection of self-attention `layer` of every text encoder.

        Raises ValueError for a layer that an encoder does not have, or that has no `out_proj`.
        """
        names = []
        for path, layers in self.text_encoders.items():
            if isinstance(layer, bool) or layer not in range(len(layers)):
                raise ValueError(
                    f"layer {layer!r} is not in {path}: choose from 0 to {len(layers) - 1}"
                )
            attention = getattr(layers[layer], "self_attn", None)
            if not hasattr(attention, "out_proj"):
                raise ValueError(
                    f"{path}.{layer} has no self_attn.out_proj: only CLIP text encoders have one"
                )
            names.append(f"{path}.{layer}.self_attn.out_proj.weight")
        return names

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
        if _is_fused(module):
            raise ValueError(
                f"text layer {layer.index} ({layer.name}) has fused projections: its to_k and to_v "
                "are no longer read; call pipe.unfuse_qkv_projections() first"
            )
        return module

    def tokenize(self, prompts: Sequence[str]) -> Int64[Tensor, "prompt token"]:
        """Token ids, padded and cut as the pipeline does: [prompt, token] long, on the CPU."""
        tokenizer = self.tokenizer
        return tokenizer(
            [self._worded(p) for p in checked_prompts(prompts)],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def subject_span(self, prompt: str, subject: str) -> tuple[int, int]:
        """(first, last) token positions of `subject` in `prompt`, both inclusive.

        The subject is matched as whole words without regard to case; of several occurrences the
        last counts, because a causal text encoder gathers the earlier ones there.

            first, last = family_of(pipe).subject_span("a house by Van Gogh", "Van Gogh")
        """
        found = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt, re.IGNORECASE))
        if not subject.strip() or not found:
            raise ValueError(
                f"subject {subject!r} is not in the prompt {prompt!r}: "
                "pass a prompt that contains it, word for word"
            )
        tokenizer = self.tokenizer

        def ids(text: str) -> list[int]:
            text = self._worded(text)
            return tokenizer(text, add_special_tokens=False, truncation=False).input_ids

        start, stop = found[-1].span()
        whole, before, upto = ids(prompt), ids(prompt[:start].rstrip()), ids(prompt[:stop])
        if whole[: len(before)] != before or whole[: len(upto)] != upto:
            raise ValueError(
                f"the tokenizer joins {subject!r} with its neighbours in {prompt!r}: "
                "put spaces around it"
            )
        full = tokenizer(self._worded(prompt), truncation=False).input_ids
        shift = next(i for i in range(len(full)) if full[i : i + len(whole)] == whole)
        first, last = shift + len(before), shift + len(upto) - 1
        room = tokenizer.model_max_length - (len(full) - len(whole) - shift)
        if last >= room:
            raise ValueError(
                f"subject {subject!r} is cut off: it ends at token {last} of {prompt!r}, but this "
                f"pipeline reads tokens 0 to {room - 1}; shorten the prompt"
            )
        return first, last

    def _worded(self, prompt: str) -> str:
        """The prompt as its tokenizer gets it (textual inversions spelled out)."""
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        return prompt if convert is None else convert(prompt, self.tokenizer)


def checked_prompts(prompts: Sequence[str]) -> list[str]:
    """`prompts` as a list; refuses a bare string, an empty list and anything that is no string."""
    if isinstance(prompts, str):
        raise ValueError(
            f"prompts must be a list of strings, got the string {prompts!r}: pass [{prompts!r}]"
        )
    prompts = list(prompts)
    if not prompts:
        raise ValueError("the list of prompts is empty: pass at least one prompt")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {prompt!r} is not a string")
    return prompts


def linear(module: nn.Module, layer: TextLayer, name: str) -> nn.Linear:
    """The plain floating-point linear `name` of an attention module, or the reason why not."""
    found = getattr(module, name, None)
    where = f"{name} of text layer {layer.index} ({layer.name})"
    if hasattr(found, "base_layer"):
        raise ValueError(
            f"{where} is wrapped by a LoRA adapter: call pipe.unload_lora_weights(), "
            "or pipe.fuse_lora() and then unload, first"
        )
    if not isinstance(found, nn.Linear):
        raise ValueError(
            f"{where} is {type(found).__name__}, not nn.Linear: a quantised or "
            "replaced projection cannot be edited; load the pipeline unquantised"
        )
    weight = found.weight
    if type(weight.data) is not torch.Tensor or not weight.is_floating_point():
        raise ValueError(
            f"{where} holds {type(weight.data).__name__} {weight.dtype}: a quantised "
            "projection cannot be edited; load the pipeline unquantised"
        )
    return found


def _is_fused(module: nn.Module) -> bool:
    """Whether a fused copy of the projections is read. `Attention` keeps its flag after they were
    unfused again: there, the processor tells."""
    from diffusers.models.attention_processor import Attention

    if isinstance(module, Attention):
        return type(module.processor).__name__.startswith("Fused")
    return getattr(module, "fused_projections", False)


def config_key(module: Any) -> str:
    """A diffusers config as JSON: hashable, and enough to build the architecture again."""
    config = {k: v for k, v in module.config.items() if not k.startswith("_")}
    return json.dumps(config, sort_keys=True, default=str)


def plain(module: nn.Module) -> Any:
    """The module below `torch.compile`, if it was compiled."""
    return getattr(module, "_orig_mod", module)


def record_text_layers(denoiser: nn.Module, *args: Any, **kwargs: Any) -> tuple[TextLayer, ...]:
    """Run `denoiser` once and number the attention modules that are handed text, as they run."""
    from diffusers.models.attention_processor import Attention

    seen: dict[str, int] = {}

    def note(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            text = kwargs.get("encoder_hidden_states")
            if text is not None:
                seen.setdefault(name, text.shape[-1])

        return hook

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in denoiser.named_modules()
        if isinstance(module, Attention)
    ]
    try:
        with torch.no_grad():
            denoiser(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(TextLayer(i, name, width) for i, (name, width) in enumerate(seen.items()))
