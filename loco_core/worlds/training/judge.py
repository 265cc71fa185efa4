"""Train the judge on drawings, noised and dimmed a little so that it also reads samples."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from ..shapeland.judge import ANSWERS, WEIGHTS, JudgeNet
from ..shapeland.vocabulary import Scene
from .data import COUNT, Drawings, drawings
from .loop import fit


def answers_of(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Index of the right answer of each head, int64 [n]."""
    labels = [scene.labels() for scene in scenes]
    return {
        name: torch.tensor([names.index(label[name]) for label in labels])
        for name, names in ANSWERS.items()
    }


@torch.inference_mode()
def accuracy(net: JudgeNet, data: Drawings) -> dict[str, float]:
    """Share of right answers per attribute."""
    truth = answers_of(data.scenes)
    logits = [net(data.floats(rows)) for rows in torch.arange(len(data)).split(500)]
    return {
        name: (torch.cat([part[name] for part in logits]).argmax(1) == truth[name])
        .float()
        .mean()
        .item()
        for name in ANSWERS
    }


def train_judge(folder: Path, device: str = "cpu", steps: int = 900, count: int = COUNT) -> None:
    """Train, check (>= 99 % for every attribute on held-out combinations), write the weights."""
    data = drawings(count, folder)
    truth = answers_of(data.scenes)
    torch.manual_seed(0)
    net = JudgeNet().to(device)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(data), (128,), generator=generator)
        images = data.floats(rows)
        noise = torch.randn(images.shape, generator=generator)
        sigma, gain = torch.rand(2, len(rows), 1, 1, 1, generator=generator)
        images = (images * (0.9 + 0.2 * gain) + 0.1 * sigma * noise).to(device)
        return net.loss(images, {name: index[rows].to(device) for name, index in truth.items()})

    fit("judge", net, loss, steps=steps, lr=2e-3, folder=folder, device=device)
    right = accuracy(net.cpu(), drawings(4000, folder, held_out=True))
    print("judge on held-out drawings:", {k: round(v, 4) for k, v in right.items()})
    if min(right.values()) < 0.99:
        raise RuntimeError(f"the judge must reach 99 % on held-out drawings, got {right}")
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in net.state_dict().items()}, WEIGHTS)
