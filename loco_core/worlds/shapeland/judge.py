"""The judge: a small CNN that names what a picture shows, one head per attribute.

It is trained on drawings alone and shares nothing with the CLIP, so that what the CLIP gets
wrong, the judge does not.
"""

import hashlib
from collections.abc import Sequence
from functools import cache

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from ...judging.score import Score
from ...zoo import CHECKPOINTS
from .vocabulary import ATTRIBUTES, NEUTRAL

WEIGHTS = CHECKPOINTS / "shared" / "judge" / "judge.safetensors"

#: What each head can answer: the attribute's values, then its neutral form.
ANSWERS: dict[str, tuple[str, ...]] = {
    name: (*values, NEUTRAL[name]) for name, values in ATTRIBUTES.items()
}


class JudgeNet(nn.Module):
    """[n, 3, 64, 64] in [0, 1] -> dict attribute -> logits [n, answers]."""

    def __init__(self, widths: tuple[int, ...] = (32, 48, 64, 96, 128, 160)):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for index, width in enumerate(widths):
            stride = 2 if index % 3 != 2 else 1
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 256), nn.SiLU())
        self.heads = nn.ModuleDict(
            {name: nn.Linear(256, len(answers)) for name, answers in ANSWERS.items()}
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(images * 2 - 1)
        return {name: head(features) for name, head in self.heads.items()}

    def loss(self, images: torch.Tensor, answers: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the heads' cross-entropies."""
        logits = self(images)
        return sum(F.cross_entropy(logits[name], answers[name]) for name in ANSWERS)


@cache
def _trained_judge() -> JudgeNet:
    if not WEIGHTS.exists():
        raise FileNotFoundError(
            f"the judge's weights {WEIGHTS} are missing; "
            f"train them with `python -m loco_core.worlds.training judge`"
        )
    with torch.inference_mode(False):  # whoever asks first: it is kept, and has gradients, too
        net = JudgeNet()
        net.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
        return net.eval()


@cache
def judge_fingerprint() -> str:
    """16 hex digits of the SHA-256 of the file with the judge's weights."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:16]


@torch.inference_mode()
def judge(images: torch.Tensor) -> dict[str, list[str]]:
    """Name every attribute of every image.

    images: [..., 3, 64, 64], floats in [0, 1], on any device; leading axes are flattened.
    Returns attribute -> list of names, one per image (the neutral names of
    `vocabulary.NEUTRAL` where nothing of the kind is shown).

    >>> from loco_core.worlds.shapeland import draw, judge
    >>> judge(draw(object="star", color="red"))["object"]
    ['star']
    """
    if images.shape[-3:] != (3, 64, 64):
        raise ValueError(
            f"the judge reads images of shape [..., 3, 64, 64], got {list(images.shape)}; "
            f"it only knows Shapeland's pictures"
        )
    flat = images.reshape(-1, 3, 64, 64).float().cpu()
    if not torch.isfinite(flat).all():
        raise ValueError("images hold NaN or infinity; nothing can be judged from them")
    logits = [_trained_judge()(chunk) for chunk in flat.split(256)]
    return {
        name: [answers[i] for part in logits for i in part[name].argmax(1).tolist()]
        for name, answers in ANSWERS.items()
    }


def seen(attribute: str, name: str) -> Score:
    """A score for `loco.localize` and `loco.trace`: 1 where the judge sees `name`, else 0.

    It takes (images [n, 3, 64, 64], prompts) and returns [n] float64; the prompts do not matter.

    >>> from loco_core.worlds.shapeland import draw, seen
    >>> seen("object", "star")(draw(object="star")[None], ["a star"])
    tensor([1.], dtype=torch.float64)
    """
    if attribute not in ANSWERS:
        raise ValueError(f"unknown attribute {attribute!r}; choose from {', '.join(ANSWERS)}")
    if name not in ANSWERS[attribute]:
        known = ", ".join(ANSWERS[attribute])
        raise ValueError(f"unknown {attribute} {name!r}; choose from {known}")

    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        answers = judge(images)[attribute]
        return torch.tensor([answer == name for answer in answers], dtype=torch.float64)

    return Score(f"loco.shapeland.seen({attribute!r}, {name!r})", judge_fingerprint(), score)
