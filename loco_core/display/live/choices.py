"""Choices of an explorer: one of some values, or any number of them."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Labels = tuple[str, ...]  # what is chosen: one label, or any number of them


@dataclass(frozen=True)
class Choice:
    """Options by their labels, and what is chosen at first. many: any number may be chosen."""

    options: Mapping[str, Any]
    start: Labels
    many: bool = False

    def value(self, chosen: Labels) -> Any:
        """The value that stands for these labels; a tuple of values if there may be many."""
        values = tuple(self.options[label] for label in chosen)
        return values if self.many else values[0]

    def worded(self, chosen: Labels) -> str:
        return ", ".join(chosen) or "nothing"

    def control(self, name: str) -> tuple[Any, Callable[[], Labels]]:
        """(its widget, what reads the labels chosen there)."""
        import ipywidgets

        if not self.many:
            slider = ipywidgets.SelectionSlider(
                options=list(self.options),
                value=self.start[0],
                description=name,
                continuous_update=False,
                layout={"width": "28em"},
            )
            return slider, lambda: (slider.value,)
        boxes = [
            ipywidgets.Checkbox(label in self.start, description=label, indent=False)
            for label in self.options
        ]
        group = ipywidgets.VBox([ipywidgets.HTML(f"<b>{html.escape(name)}</b>"), *boxes])
        return group, lambda: tuple(box.description for box in boxes if box.value)


def one_of(options: Sequence[Any] | Mapping[str, Any], start: Any = None) -> Choice:
    """A choice of one value, with a slider. start: the label or value chosen at first; by default
    the first. Raises ValueError without options, and for a start that is none of them.

        one_of([0, 5, 10, 50], start=10)
    """
    labels = _labels(options)
    return Choice(labels, (_found(labels, start) if start is not None else next(iter(labels)),))


def any_of(options: Sequence[Any] | Mapping[str, Any], start: Sequence[Any] = ()) -> Choice:
    """A choice of any number of values, with checkboxes; `compute` is given a tuple of them.

    any_of({"twins": concept.neutral, "other artists": others}, start=["twins"])
    """
    labels = _labels(options)
    return Choice(labels, tuple(_found(labels, each) for each in start), many=True)


def _labels(options: Any) -> dict[str, Any]:
    named = isinstance(options, Mapping)
    pairs = list(options.items()) if named else [(_word(value), value) for value in options]
    labels = dict(pairs)
    if not pairs or len(labels) < len(pairs):
        raise ValueError(
            f"a choice needs options with labels that differ, got {[k for k, _ in pairs]}: name "
            "them with a mapping of label to value"
        )
    return labels


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _found(labels: Mapping[str, Any], start: Any) -> str:
    if isinstance(start, str) and start in labels:
        return start
    if _word(start) in labels:
        return _word(start)
    raise ValueError(f"start {start!r} is no option; choose from {', '.join(labels)}")
