"""The command line `loco`: the methods of the library, their results in folders.

    loco localize mini-sd --concept "style:Mira Holt" --out found
    loco edit mini-sd --window-from found --out gone
    loco generate mini-sd --edit gone --prompt "a red star by Mira Holt" --out pictures

`options` says what can be asked and `read` reads it, `report` says what is printed, `command` what
all commands have in common; `loco_core.files` makes the result folders. The commands are in `look`,
`find`, `change`, `inside` and `store`; all they do is done by the library. Nothing heavy is
imported before a command runs.

Exit codes: 0 done; 1 what was asked cannot be done; 2 the command line is wrong; 130 Ctrl-C.
"""

import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from typer.main import get_command

from .command import Call, app

__all__ = ["app", "main"]

# they register their commands, in the order of the help
for _name in ("look", "find", "change", "inside", "store"):
    import_module(f"{__name__}.{_name}")

_PLAIN = (OSError, RuntimeError, TypeError, ValueError)  # their messages speak for themselves


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `loco` with `arguments`, by default those of the process, and return its exit code.

    main(["models"])
    """
    call = Call(tuple(sys.argv[1:] if arguments is None else arguments))
    with warnings.catch_warnings():
        warnings.showwarning = _warned
        try:
            code = get_command(app).main(
                call.arguments or ["--help"], prog_name="loco", standalone_mode=False, obj=call
            )
        except Exception as error:
            if call.debug:
                traceback.print_exc()
            _tell("error", _message(error))
            return getattr(error, "exit_code", 1)  # typer's are 2 for a wrong command line
    if code == 130:
        _tell("error", "interrupted")
    return code or 0


def _message(error: Exception) -> str:
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        return f"{error.format_message()} (see {context.command_path if context else 'loco'} -h)"
    told = str(error)
    return told if told and isinstance(error, _PLAIN) else f"{type(error).__name__}: {told}"


def _warned(message: Warning | str, *_: Any, **__: Any) -> None:
    _tell("warning", str(message))


def _tell(what: str, text: str) -> None:
    print(f"{what}: {' '.join(text.split())}", file=sys.stderr)
