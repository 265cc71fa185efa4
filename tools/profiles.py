"""A profile: the papermill parameters of one kind of machine, `profiles/<name>.yaml`.

    device: cpu                 # or cuda: a profile that needs a GPU says so here
    parameters: {model: mini-sd}

Only parameters differ between profiles; the notebooks are the same.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = "mini"
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Profile:
    """Name, device it needs (`cpu` runs anywhere) and notebook parameters by name."""

    name: str
    device: str
    parameters: dict[str, object]


def load_profile(name: str, folder: Path = ROOT / "profiles") -> Profile:
    """Read `folder`/`name`.yaml; ValueError names an unknown profile, key or device."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ValueError(f"unknown profile {name!r}: choose one of {known}, or write {path.name}")
    content = yaml.safe_load(path.read_text()) or {}
    unknown = sorted(set(content) - {"device", "parameters"})
    if unknown:
        raise ValueError(f"{path.name}: unknown key {unknown[0]!r}, expected device, parameters")
    device = content.get("device", "cpu")
    if device not in DEVICES:
        raise ValueError(f"{path.name}: unknown device {device!r}, expected {' or '.join(DEVICES)}")
    return Profile(name, device, content.get("parameters") or {})


def check_parameters(profile: Profile, known: dict[str, set[str]]) -> None:
    """Refuse a parameter that no notebook has. `known`: parameter names by notebook stem."""
    union = set().union(*known.values())
    for key in profile.parameters:
        if key not in union:
            raise ValueError(
                f"profile {profile.name!r} sets {key!r}, which no notebook has as a parameter: "
                f"choose from {', '.join(sorted(union))}"
            )


def check_device(profile: Profile) -> None:
    """Stop before any work if the profile needs a GPU and torch sees none."""
    import torch

    if profile.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"profile {profile.name!r} needs an NVIDIA GPU, and torch {torch.__version__} sees "
            "none here: run it on a machine with a GPU and a CUDA build of torch, or use "
            f"`make execute PROFILE={DEFAULT}`"
        )
