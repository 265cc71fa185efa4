"""What a command found: `result.json`, the same on standard output, or a short table."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LINES = 20  # of a table that are printed
TILE = 256  # pixels: larger images are reduced on a sheet
GAP = 2  # pixels between them


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


def save_image(path: Path, pixels: Any) -> None:
    """Write one image, [3, H, W] uint8, to a PNG."""
    path.parent.mkdir(exist_ok=True)
    _image(pixels).save(path)


def save_sheet(path: Path, images: Iterable[Any], columns: int) -> None:
    """Write images, [3, H, W] uint8 or in [0, 1], to one PNG, row by row, large ones reduced.

    They are taken one by one, and only the reduced ones are held.
    """
    from PIL import Image

    tiles = [_reduced(_image(image)) for image in images]
    width, height = (max(side) + GAP for side in zip(*(x.size for x in tiles), strict=True))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * width - GAP, rows * height - GAP), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width, number // columns * height))
    sheet.save(path)


def _image(pixels: Any) -> Any:
    from PIL import Image

    if pixels.is_floating_point():
        pixels = pixels.clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def _reduced(image: Any) -> Any:
    from PIL.Image import Resampling

    share = TILE / max(image.size)
    smaller = [max(1, round(side * share)) for side in image.size]
    return image if share >= 1 else image.resize(smaller, Resampling.BOX)


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
