"""One training loop for every network of Shapeland: seeded, resumable, with a progress bar."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as processes
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

#: loss(number of the batch, generator) -> scalar; the batch depends on these two alone.
Loss = Callable[[int, torch.Generator], torch.Tensor]


def fit(
    name: str,
    model: nn.Module,
    loss: Loss,
    *,
    steps: int,
    lr: float,
    folder: Path,
    decay: float = 0.3,
    weight_decay: float = 0.01,
    ema: float | None = None,
    device: str = "cpu",
    save_every: int = 250,
) -> list[dict]:
    """Train `model` in place for `steps` steps and return the log.

    AdamW under bfloat16 autocast; the learning rate warms up over 200 steps, stays, and falls
    linearly to zero over the last `decay` of the steps. With `ema`, `model` ends with averaged
    weights. State is written to `folder/name.pt` every `save_every` steps, atomically; a call
    that finds such a state goes on from it. The generator of a step depends on the step alone,
    so that a killed and resumed run sees the batches of an unbroken one.

    In a process group (see `parallel`) every process takes a batch of its own, and the gradients
    are averaged.
    """
    rank, world = (
        (processes.get_rank(), processes.get_world_size()) if processes.is_initialized() else (0, 1)
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
    )
    average = EMAModel(weights, decay=ema, foreach=True) if ema else None
    start, log = 0, []
    if path.exists():
        state = torch.load(path, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average:
            average.load_state_dict(state["average"])
            average.to(device)
        start, log = state["step"], state["log"]

    def save(step: int) -> None:
        if rank > 0:
            return
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"step": step, "log": log, "average": average and average.state_dict()}
        torch.save(state, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)

    model.train()
    total, count, since = 0.0, 0, time.monotonic()
    with tqdm(total=steps, initial=start, desc=name, unit="step", disable=rank > 0) as bar:
        for step in range(start, steps):
            share = min((step + 1) / 200, (steps - step) / (decay * steps), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = lr * share
            draw = step * world + rank
            generator = torch.Generator().manual_seed(draw)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                value = loss(draw, generator)
            value.backward()
            if world > 1:
                _average_gradients(weights, world)
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if average:
                average.step(weights)
            total, count = total + value.item(), count + 1
            bar.update()
            if (step + 1) % 50 == 0 or step + 1 == steps:
                seconds = round(time.monotonic() - since, 1)
                log.append({"step": step + 1, "loss": total / count, "seconds": seconds})
                bar.set_postfix(loss=f"{total / count:.4f}")
                total, count, since = 0.0, 0, time.monotonic()
            if (step + 1) % save_every == 0 or step + 1 == steps:
                save(step + 1)
    if average:
        average.copy_to(weights)
    model.eval()
    if rank == 0:
        (folder / f"{name}.log.json").write_text(json.dumps(log, indent=1))
    return log


def _average_gradients(weights: list[nn.Parameter], world: int) -> None:
    """Every process ends with the mean of the gradients of all."""
    flat = torch.cat([weight.grad.flatten() for weight in weights])
    processes.all_reduce(flat)
    parts = flat.div_(world).split([weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.grad.copy_(part.view_as(weight))
