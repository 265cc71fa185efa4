"""What all commands have in common: a model, options, a result folder, something to print."""

import json
import platform
import shlex
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

import loco_core as loco

from ..files import MANIFEST, new_folder
from . import options as o
from . import read
from .report import Report

LOADING = ("model", "device", "dtype", "variant", "revision")

app = typer.Typer(
    name="loco",
    rich_markup_mode=None,  # plain help: quick, and an example can be copied from it
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""Exit codes: 0 done; 1 what was asked cannot be done, told in one line; 2 the command
    line is wrong; 130 stopped by Ctrl-C. A result folder is there whole or not at all.""",
)


@dataclass
class Call:
    """One run of `loco`."""

    arguments: tuple[str, ...]
    debug: bool = False
    started: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Work:
    """What a command works with.

    pipe: a pipeline. folder: to fill. parts: a store for the pictures of a long run. map: who
    paints them, see `painting.engine`.
    """

    pipe: Any
    folder: Path
    parts: Path | None
    map: Any = map


def command(example: str, keeps: bool = True, paints: bool = False) -> Callable:
    """Make `body(work, *, own options)` -> Report a command, with the options that all have.

    keeps: it has a result folder. paints: it can be resumed, and an engine can do it. example: ends
    its help.
    """
    common: dict[str, tuple[Any, Any]] = {
        "device": (o.Device, None),
        "dtype": (o.Dtype, "float32"),
        "variant": (o.Variant, None),
        "revision": (o.Revision, None),
    }
    if keeps:
        common |= {"out": (o.Out, ...), "force": (o.Force, False)}
    if paints:
        common |= {"engine": (o.Engine, None), "resume": (o.Resume, False)}
    common |= {"as_json": (o.Json, False), "quiet": (o.Quiet, False), "debug": (o.Debug, False)}

    def register(body: Callable[..., Report]) -> Callable[..., Report]:
        own = list(signature(body).parameters.values())[1:]
        names = {parameter.name for parameter in own}

        def run(ctx: typer.Context, **given: Any) -> None:
            ctx.obj.debug = given["debug"]
            if given["quiet"]:
                loco.progress(False)
            settings = {name: given[name] for name in names}
            out = given.get("out")
            with (
                _place(out, given.get("force"), given.get("resume")) as (folder, parts),
                loco.painting.engine(given.get("engine")) as map,
            ):
                pipe = loaded(**{name: given[name] for name in LOADING})
                report = body(Work(pipe, folder, parts, map), **settings)
                if keeps:
                    (folder / "result.json").write_text(report.to_json() + "\n", "utf-8")
                    (folder / MANIFEST).write_text(_manifest(ctx, pipe, given) + "\n", "utf-8")
            show(report, given["as_json"], out)

        own = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in own]
        shared = [_parameter(n, t, d) for n, (t, d) in common.items() if n not in names]
        context, model = _parameter("ctx", typer.Context, ...), _parameter("model", o.Model, ...)
        run.__signature__ = Signature(  # type: ignore[attr-defined]
            [context, model, *own, *shared]
        )
        run.__annotations__ = {p.name: p.annotation for p in [context, model, *own, *shared]}
        register_as(body.__name__, body.__doc__, example)(run)
        return body

    return register


def register_as(name: str, text: str | None, example: str) -> Callable:
    """Register a function as the command `name`, whose help ends in an example."""
    return app.command(name, help=text, epilog=f"Example:\n\n\b\n{example}")


def loaded(model: str, dtype: str, **asked: Any) -> Any:
    """The pipeline, as it was asked for."""
    import torch

    return loco.load(model, dtype=getattr(torch, dtype), **asked)


def show(report: Report, as_json: bool, out: Path | None = None) -> None:
    """Print a report, as JSON and nothing else or for a reader."""
    text = report.to_json() if as_json else report.to_text()
    print(text if as_json or out is None else f"{text}\nwritten to {out}")


@app.callback(invoke_without_command=True)
def _loco(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Find and change what a text-to-image diffusion model knows."""
    if version:
        print(f"loco {loco.__version__}")


def _place(out: Path | None, force: bool | None, resume: bool | None) -> Any:
    return nullcontext((None, None)) if out is None else new_folder(out, bool(force), resume)


def _parameter(name: str, annotation: Any, default: Any) -> Parameter:
    default = Parameter.empty if default is ... else default
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _manifest(ctx: typer.Context, pipe: Any, given: dict[str, Any]) -> str:
    """How a result was made: the command, every setting, the model, versions, and the time."""
    call = ctx.obj
    settings = {k: v for k, v in given.items() if k not in ("as_json", "quiet", "debug", "force")}
    told = {
        "command": shlex.join(["loco", *call.arguments]),
        "settings": settings,
        "model": asdict(loco.records.provenance(pipe)),
        "device": str(pipe.device),
        "python": platform.python_version(),
        "started": datetime.fromtimestamp(call.started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - call.started, 3),
    }
    if seeds := settings.get("seeds"):
        told["seeds"] = read.numbers(seeds)
    return json.dumps(told, indent=1, ensure_ascii=False, default=str)
