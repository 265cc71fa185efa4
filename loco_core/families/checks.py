"""What cannot be hooked or edited, said before anything is computed, with the way out of it."""

import operator
from typing import Any

from torch import nn

__all__ = ["PLAIN", "plain_module", "refuse_compiled", "refuse_fused",
           "refuse_streamed", "whole_number"]  # fmt: skip

#: Modules whose output is their `weight` times what they read (plus a bias), and nothing else.
PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def plain_module(owner: nn.Module, name: str, where: str, *, values: bool = True) -> nn.Module:
    """The linear or convolution `name` of `owner`, whose weight is what the network multiplies by.

    where: how a message calls it. values: the weight must be at hand, not offloaded to be fetched
    at each call. Raises ValueError, with the way out, for one that is fused with its neighbours,
    wrapped by an adapter, replaced, quantised or offloaded.

        plain_module(unet.mid_block.attentions[0].transformer_blocks[0].attn2, "to_k", "to_k")
    """
    refuse_fused(owner, where)
    module: Any = getattr(owner, name, None)
    if hasattr(module, "base_layer"):
        raise ValueError(
            f"{where} is wrapped by a LoRA adapter: call pipe.unload_lora_weights(), or "
            "pipe.fuse_lora() and then pipe.unload_lora_weights(), first"
        )
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, PLAIN) or type(weight) is not nn.Parameter:
        raise ValueError(
            f"{where} belongs to a {type(module).__name__} and holds a {type(weight).__name__}, "
            "quantised or replaced: only a plain nn.Linear or convolution can be edited; load the "
            "pipeline unquantised"
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ValueError(f"{where} is quantised to {weight.dtype}: load the pipeline unquantised")
    if values and weight.device.type == "meta":
        raise ValueError(f"{where} is offloaded: load the pipeline without sequential CPU offload")
    return module


def refuse_fused(attention: nn.Module, where: str) -> None:
    """Raises ValueError if `attention` reads a fused copy of its projections."""
    # A UNet's attention keeps its flag after it was unfused again: there, the processor tells.
    processor = type(getattr(attention, "processor", None)).__name__
    told = hasattr(attention, "unfuse_projections") or "Fused" in processor
    if getattr(attention, "fused_projections", False) and told:
        raise ValueError(
            f"{where}: fused projections are read in its place; call "
            "pipe.unfuse_qkv_projections() first"
        )


def refuse_compiled(network: nn.Module) -> None:
    """Hooks added after `torch.compile` are silently ignored: say so instead.

    Raises ValueError naming the first compiled module of `network`.
    """
    for name, module in network.named_modules():
        if getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod"):
            raise ValueError(
                f"the denoiser is compiled ({name or type(module).__name__}) and would ignore the "
                "hooks that route text: load the pipeline again and do not call torch.compile"
            )


def refuse_streamed(network: nn.Module, where: str) -> None:
    """Group offloading by a stream keeps pinned copies of all weights, and puts them back after
    each call. Raises ValueError for a network, called `where`, that is offloaded so."""
    for module in network.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = registry and registry.get_hook("group_offloading")
        if hook and getattr(hook.group, "stream", None) is not None:
            raise ValueError(
                f"{where} is offloaded in groups by a stream, which would put its own copies of "
                "the weights back: edit the pipeline first and offload it then, or use "
                "enable_model_cpu_offload()"
            )


def whole_number(value: Any, low: int, high: int) -> int | None:
    """`value` as an int if it is a whole number from low to high, numpy's included; else None.

    >>> whole_number(3, 1, 16), whole_number(True, 0, 1), whole_number(2.0, 1, 16)
    (3, None, None)
    """
    try:
        number = operator.index(value)
    except TypeError:
        return None
    return None if isinstance(value, bool) or not low <= number <= high else number
