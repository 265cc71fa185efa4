"""The call of a latent diffusion: noise, a text for every row, one call of the pipeline, pictures.

The pipeline itself is called, with a copy of its scheduler, its image size and its decoder, so one
that was subclassed keeps working. Row by row the noise comes from a CPU generator of its own: a
picture does not depend on the batch it was made in, nor on the device or the dtype its noise is
used in.
"""

import copy
import logging
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from .base import Model
from .text import TextStates

__all__ = ["LatentModel", "own_scheduler"]

#: Pixels that are decoded at once: a batch that has more is decoded one picture at a time, because
#: decoding takes the most memory of all (0.3 GB and more for each further picture of 384 pixels).
AT_ONCE = 1024 * 1024


class LatentModel(Model):
    """A pipeline that starts from noise in the latents of its VAE, `pipe(latents=...)`.

    A family says how it hands prompts over, `_inputs`, and, if it differs, how large its latents
    are, `_latent_shape`.
    """

    @abstractmethod
    def _inputs(self, texts: TextStates, negative: TextStates) -> dict[str, Any]:
        """Keyword arguments that hand encoded prompts to the pipeline's `__call__`."""

    def _latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a picture of `size` pixels."""
        config = self.denoiser.config
        if size is None:
            side = config.sample_size
            height, width = (side, side) if isinstance(side, int) else side
        else:
            height, width = (pixels // self.pipe.vae_scale_factor for pixels in size)
        return config.in_channels, height, width

    @torch.no_grad()
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
        """Pictures [row, 3, H, W] float32 in [0, 1], on the CPU: rows[b] with seeds[b].

        negative: what guidance pushes away from, a row each or one for all. guidance: the CFG
        scale; 1 or less is without. eta: of DDIM. size: (height, width) in pixels, None: the
        pipeline's own. tick: called after every step. The pipeline is left as it was.
        Raises ValueError for a size that does not fit, for a pipeline that needs more than prompts
        (an IP-Adapter), and for pictures that are not finite or that a safety checker blackened.

            model = family_of(loco.load("mini-sd"))
            states = model.encode(["a star", ""])
            model.call(states[:1], states[1:], [0], steps=8, guidance=7.5).shape  # [1, 3, 64, 64]
        """
        size = _checked_size(self.pipe, size)
        generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
        with self._sliced(len(rows), size), _quiet_decoder():
            made = self._sample(
                rows, negative, generators, steps, guidance, eta, size, tick, output_type="pt"
            )
        images = made.images
        _refuse_blackened(made, seeds)
        broken = [s for s, image in zip(seeds, images, strict=True) if not image.isfinite().all()]
        if broken:
            raise ValueError(
                f"{len(broken)} of {len(seeds)} pictures are not finite (seed {broken[0]}): the "
                f"VAE or the denoiser overflows in {self.dtype}, or a weight is damaged; load the "
                'pipeline with dtype="bfloat16" or "float32", or let the VAE of an SD-XL compute '
                "in float32, pipe.vae.register_to_config(force_upcast=True)"
            )
        return images.float().cpu()

    @torch.no_grad()
    def latents(
        self,
        rows: TextStates,
        negative: TextStates,
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance: float,
    ) -> Float[Tensor, "row channel height width"]:
        """The latents that end the trajectories, on the pipeline's device: as `call`, undecoded.

        generators: of the rows, on the CPU; what they draw next is what `call` would have drawn.
        """
        return self._sample(
            rows, negative, generators, steps, guidance, output_type="latent"
        ).images

    @torch.no_grad()
    def encoded(
        self, images: Float[Tensor, "image 3 height width"]
    ) -> Float[Tensor, "image channel y x"]:
        """Latents of images in [0, 1], as the denoiser knows them. Raises ValueError for images
        that are not of the pipeline's own size."""
        vae, wanted = self.pipe.vae, self._latent_shape()
        dtype = vae.dtype
        overflows = dtype == torch.float16 and vae.config.get("force_upcast")  # SD-XL's own does
        try:
            if overflows:
                vae.to(torch.float32)
            found = vae.encode((2 * images - 1).to(self.device, vae.dtype)).latent_dist.mode()
        finally:
            if overflows:
                vae.to(dtype)
        if tuple(found.shape[1:]) != wanted:
            raise ValueError(
                f"images of {list(images.shape[-2:])} pixels have latents {list(found.shape[1:])}, "
                f"but this pipeline works on {list(wanted)}: resize them"
            )
        return ((found - (vae.config.shift_factor or 0)) * vae.config.scaling_factor).to(dtype)

    def _sample(
        self,
        rows: TextStates,
        negative: TextStates,
        generators: Sequence[torch.Generator],
        steps: int,
        guidance: float,
        eta: float = 0.0,
        size: tuple[int, int] | None = None,
        tick: Callable[[], object] | None = None,
        *,
        output_type: str,
    ) -> Any:
        """What the pipeline returns."""
        if len(rows) != len(generators) or len(negative) not in (1, len(rows)):
            raise ValueError(
                f"{len(rows)} prompts with {len(generators)} seeds and {len(negative)} negative "
                "prompts: give one of each a row, or one negative prompt for all"
            )
        _refuse_image_prompts(self.denoiser)
        pixels = {} if size is None else dict(zip(("height", "width"), size, strict=True))
        shape = self._latent_shape(size)
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])

        def after(pipe: Any, step: int, time: Any, state: dict) -> dict:
            if tick is not None:
                tick()
            return state

        with own_scheduler(self.pipe):
            return self.pipe(
                **self._inputs(rows, negative[[0] * len(rows)] if len(negative) == 1 else negative),
                **pixels,
                latents=noise.to(rows.embeds),
                generator=list(generators),
                num_inference_steps=int(steps),
                guidance_scale=guidance,
                eta=eta,
                output_type=output_type,
                callback_on_step_end=after,
            )

    @contextmanager
    def _sliced(self, rows: int, size: tuple[int, int] | None) -> Iterator[None]:
        """The decoder takes one picture at a time if there is much to decode; after, as it was."""
        vae, (_, height, width) = self.pipe.vae, self._latent_shape(size)
        before = getattr(vae, "use_slicing", None)
        much = rows * height * width * self.pipe.vae_scale_factor**2 > AT_ONCE
        if before is not None:
            vae.use_slicing = before or much
        try:
            yield
        finally:
            if before is not None:
                vae.use_slicing = before


@contextmanager
def own_scheduler(pipe: Any) -> Iterator[None]:
    """A copy of the scheduler to work with, and no bar of the pipeline's own."""
    scheduler, bars = pipe.scheduler, getattr(pipe, "_progress_bar_config", None)
    pipe.scheduler = copy.deepcopy(scheduler)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.scheduler = scheduler
        if bars is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = bars


def _checked_size(pipe: Any, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """`size` in whole pixels; refuses what the VAE and the pipeline cannot make."""
    if size is None:
        return None
    unit = math.lcm(8, pipe.vae_scale_factor)  # diffusers asks for eighths, whatever the VAE
    for pixels in size if isinstance(size, tuple | list) and len(size) == 2 else (None,):
        fits = isinstance(pixels, Integral) and not isinstance(pixels, bool)
        if not fits or pixels < unit or pixels % unit:
            raise ValueError(
                f"size {size!r} is not (height, width) in pixels, multiples of {unit}: pass "
                f"({64 * unit}, {64 * unit}), say, or None for the model's own size"
            )
    return int(size[0]), int(size[1])


def _refuse_image_prompts(denoiser: Any) -> None:
    """An IP-Adapter wants an image beside each prompt, and hands both to the text layers."""
    if getattr(denoiser.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        raise ValueError(
            "an IP-Adapter is loaded: its pictures need an image beside the prompt, and its text "
            "layers read both; call pipe.unload_ip_adapter() first"
        )


def _refuse_blackened(made: Any, seeds: Sequence[int]) -> None:
    flags = getattr(made, "nsfw_content_detected", None) or []
    flagged = [seed for seed, flag in zip(seeds, flags, strict=False) if flag]
    if flagged:
        raise ValueError(
            f"the pipeline's safety checker blackened {len(flagged)} of {len(seeds)} pictures "
            f"(seed {flagged[0]}), which then say nothing about the model: load the pipeline "
            "with safety_checker=None"
        )


@contextmanager
def _quiet_decoder() -> Iterator[None]:
    """Without what diffusers says when SD-XL in float16 decodes in float32 and rounds back: that
    its own method for it is deprecated, and that no module at all should have stayed as it was."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addFilter(_names_a_module)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`upcast_vae` is deprecated", FutureWarning)
            yield
    finally:
        logger.removeFilter(_names_a_module)


def _names_a_module(record: logging.LogRecord) -> bool:
    return "should be kept in float32: []" not in record.getMessage()
