"""A profile: the papermill parameters of one kind of machine, `profiles/<name>.yaml`.

    device: cuda                     # or cpu, the default: a profile that needs a GPU says so here
    gpu_gib: 16                      # and how much memory it should have
    notebooks: [10_your_own_model]   # by default all of them
    parameters: {your_model: owner/name, revision: <commit>}

Only parameters differ between profiles; the notebooks are the same. A model or a CLIP that is a Hub
id is looked for before anything is executed: in the Hugging Face cache, then on the Hub.

    python -m tools.profiles pin NAME    # replace its revisions by the commits they mean today
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from loco_core.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = "mini"
DEVICES = ("cpu", "cuda")
KEYS = ("device", "gpu_gib", "notebooks", "parameters")
REVISIONS = {"your_model": "revision", "clip": "clip_revision"}  # parameters that name weights
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SECONDS = 5  # to wait for the Hub


@dataclass(frozen=True)
class Profile:
    """Name, device it needs (`cpu` runs anywhere) and notebook parameters by name.

    notebooks: those it runs, None for all. gpu_gib: memory its GPU should have.
    """

    name: str
    device: str
    parameters: dict[str, object]
    notebooks: tuple[str, ...] | None = None
    gpu_gib: float = 0


@dataclass(frozen=True)
class Weights:
    """Published weights: Hub id, revision ("" is the newest), and variant of a pipeline's files.

    variant: None for a CLIP, which is no pipeline.
    """

    id: str
    revision: str
    variant: str | None

    def __str__(self) -> str:
        return f"{self.id} at {self.revision or 'its newest revision'}"

    @property
    def command(self) -> str:
        """The shell command that downloads the files that are read, and no others."""
        if self.variant is None:
            files = ["*.json", "*.txt", "model.safetensors"]
        elif self.variant:
            files = ["*.json", "*.txt", f"*.{self.variant}.safetensors"]
        else:
            files = ["model_index.json", "*/*"]
        revision = [f"--revision {self.revision}"] if self.revision else []
        return " ".join(["hf download", self.id, *revision, *(f"--include '{x}'" for x in files)])


def load_profile(name: str, folder: Path = ROOT / "profiles") -> Profile:
    """Read `folder`/`name`.yaml; ValueError names an unknown profile, key or device."""
    path = _path(name, folder)
    content = yaml.safe_load(path.read_text()) or {}
    unknown = sorted(set(content) - set(KEYS))
    if unknown:
        raise ValueError(f"{path.name}: unknown key {unknown[0]!r}, expected {', '.join(KEYS)}")
    device = content.get("device", "cpu")
    if device not in DEVICES:
        raise ValueError(f"{path.name}: unknown device {device!r}, expected {' or '.join(DEVICES)}")
    notebooks = content.get("notebooks")
    return Profile(
        name,
        device,
        content.get("parameters") or {},
        None if notebooks is None else tuple(notebooks),
        content.get("gpu_gib", 0),
    )


def check_parameters(profile: Profile, known: dict[str, set[str]]) -> None:
    """Refuse a notebook that does not exist, and a parameter that no notebook it runs has.

    known: parameter names by notebook stem.
    """
    for stem in profile.notebooks or ():
        if stem not in known:
            raise ValueError(
                f"profile {profile.name!r} runs {stem!r}, which does not exist: choose from "
                f"{', '.join(known)}"
            )
    union = set().union(*(known[stem] for stem in profile.notebooks or known))
    for key in profile.parameters:
        if key not in union:
            raise ValueError(
                f"profile {profile.name!r} sets {key!r}, which no notebook has as a parameter: "
                f"choose from {', '.join(sorted(union))}"
            )


def check_device(profile: Profile) -> None:
    """Stop before any work, with one message that tells all that is missing: GPU and weights."""
    if lacks := missing(profile):
        raise ValueError(
            f"profile {profile.name!r} needs "
            + "\nand ".join(lacks)
            + f"\nWithout them, `make execute PROFILE={DEFAULT}` runs everywhere"
        )


def missing(profile: Profile) -> list[str]:
    """What this machine lacks to run `profile`, each with what to do about it."""
    import torch

    lacks = []
    if profile.device == "cuda":
        enough = f"of {profile.gpu_gib:g} GiB or more" if profile.gpu_gib else "of any size"
        if not torch.cuda.is_available():
            lacks.append(
                f"an NVIDIA GPU, and torch {torch.__version__} sees none here: run it on a machine "
                f"with a GPU {enough} and a CUDA build of torch"
            )
        elif (total := torch.cuda.get_device_properties(0).total_memory / 2**30) < profile.gpu_gib:
            lacks.append(
                f"a GPU {enough}, and {torch.cuda.get_device_name()} has {total:.1f}: take a "
                "larger one, or set gpu_gib lower and batch_size: 1, tiles: true"
            )
    for weights in weights_of(profile):
        if cached(weights) is not None:
            continue
        commit, reason = on_the_hub(weights)
        if commit is None:
            lacks.append(
                f"the weights of {weights}, which are not (or not all) in the Hugging Face cache, "
                f"and the Hub is out of reach ({reason}): with a connection to it, run\n"
                f"    {weights.command}"
            )
    return lacks


def weights_of(profile: Profile) -> list[Weights]:
    """The published weights that the parameters of `profile` name by a Hub id."""
    given = {key: str(value or "") for key, value in profile.parameters.items()}
    found = []
    for key, revision in REVISIONS.items():
        name = given.get(key, "")
        if HUB_ID.fullmatch(name) and not Path(name).is_dir():
            variant = None if key == "clip" else given.get("variant", "")
            found.append(Weights(name, given.get(revision, ""), variant))
    return found


def cached(weights: Weights) -> Path | None:
    """The folder of a finished download in the Hugging Face cache, named by its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(weights.id, revision=weights.revision or None, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None
    if weights.variant is None:
        return folder if _is_whole(folder, "") else None
    index = folder / "model_index.json"
    if not index.is_file():
        return None
    unread = ("safety_checker", "feature_extractor", "image_encoder")
    parts = [
        folder / name
        for name, entry in json.loads(index.read_text()).items()
        if isinstance(entry, list) and entry[0] is not None and name not in unread
    ]
    return folder if all(_is_whole(part, weights.variant) for part in parts) else None


def on_the_hub(weights: Weights) -> tuple[str | None, str]:
    """(commit, ""), or (None, why the Hub does not hand these weights out to this machine)."""
    from huggingface_hub import HfApi

    revision = weights.revision or None
    try:
        return HfApi().model_info(weights.id, revision=revision, timeout=SECONDS).sha, ""
    except Exception as error:  # no network, no such commit, a licence to accept, ...
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"


def commit_of(weights: Weights) -> str:
    """The commit that the revision of `weights` means: as the Hub says, else the cache."""
    commit, reason = on_the_hub(weights)
    if commit is not None:
        return commit
    folder = cached(weights)
    if folder is None:
        raise ValueError(f"no commit of {weights} is known: the Hub is out of reach ({reason})")
    return folder.name


def pin(name: str, folder: Path = ROOT / "profiles") -> dict[str, str]:
    """Write into `folder`/`name`.yaml the commits that its revisions mean now: id -> commit.

    Raises ValueError, and writes nothing, if one is not known or has no line of its own.
    """
    path, profile, commits = _path(name, folder), load_profile(name, folder), {}
    text = path.read_text()
    for weights in weights_of(profile):
        (key,) = (r for k, r in REVISIONS.items() if profile.parameters.get(k) == weights.id)
        line = re.compile(rf"^([ \t]+{key}:)[ \t]*[^\s#]*", re.MULTILINE)
        if len(line.findall(text)) != 1:
            raise ValueError(f"{path.name}: give {key} one line of its own, `{key}: main`")
        commits[weights.id] = commit_of(weights)
        text = line.sub(rf"\1 {commits[weights.id]}", text)
    atomic_write(path, text.encode())
    return commits


def _path(name: str, folder: Path) -> Path:
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ValueError(f"unknown profile {name!r}: choose one of {known}, or write {path.name}")
    return path


def _is_whole(folder: Path, variant: str) -> bool:
    """Whether a component's files are there: of a network, its config and its weights."""
    files = {path.name for path in folder.glob("*") if path.is_file()}
    weights = {name for name in files if name.endswith((".safetensors", ".bin"))}
    if not weights and "config.json" not in files:
        return bool(files)  # a tokenizer, a scheduler
    return "config.json" in files and any(not variant or f".{variant}." in x for x in weights)


def main(arguments: list[str] | None = None) -> int:
    """Pin a profile; 0 if that went well, 1 with a message if not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["pin"])
    parser.add_argument("name", metavar="NAME", help="a file in profiles/")
    options = parser.parse_args(arguments)
    try:
        for hub_id, commit in pin(options.name).items():
            print(f"{hub_id}: {commit}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
