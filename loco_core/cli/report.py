"""What a command found: `result.json`, the same on standard output, or a short table."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LINES = 20  # of a table that are printed
TILE = 256  # pixels: larger images are reduced on a sheet


@dataclass(frozen=True)
class Report:
    """facts: name -> value; tables: name -> rows, each column -> value. Both are in the JSON.

    shown: the rows to print, if not those of the first table.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    shown: Sequence[Mapping[str, Any]] | None = None

    def to_json(self) -> str:
        """JSON that every parser reads: what is no finite number is null."""
        return json.dumps(_plain({**self.facts, **self.tables}), indent=1, ensure_ascii=False)

    def to_text(self) -> str:
        """The facts, a line each, and the beginning of the table."""
        lines = [f"{name}: {_text(value)}" for name, value in self.facts.items()]
        rows = next(iter(self.tables.values()), ()) if self.shown is None else self.shown
        if rows:
            lines += ["", *_aligned(rows[:LINES])] if lines else _aligned(rows[:LINES])
        if len(rows) > LINES:
            lines.append(f"... and {len(rows) - LINES} more")
        return "\n".join(lines)


def save_image(path: Path, image: Any) -> None:
    """Write one image, [3, H, W] in [0, 1], to a PNG."""
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.cpu().numpy()).save(path)


def save_sheet(path: Path, images: Any, columns: int) -> None:
    """Write images [..., 3, H, W] in [0, 1] to one PNG, row by row, large ones reduced."""
    from torch import from_numpy
    from torch.nn.functional import interpolate

    from ..display import contact_sheet

    tiles = images.flatten(0, -4)
    if (largest := max(tiles.shape[-2:])) > TILE:
        tiles = interpolate(tiles, scale_factor=TILE / largest, mode="area")
    save_image(path, from_numpy(contact_sheet(tiles, columns)))


def rows_of(frame: Any) -> list[dict[str, Any]]:
    """The rows of a pandas table."""
    return frame.to_dict("records")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else ""
    return "" if value is None else str(value)


def _aligned(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as lines: a header, then values, each column as wide as its widest cell."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, line, widths)) for line in cells)
    return [line.rstrip() for line in lines]
