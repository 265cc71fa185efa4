"""A judge: names what pictures show, and can say who it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Judge", "judge_of"]

#: [n, 3, H, W] in [0, 1] -> attribute -> n names.
Names = Callable[[Tensor], Mapping[str, Sequence[str]]]


@dataclass(frozen=True)
class Judge:
    """A named judge. function: images [n, 3, H, W] in [0, 1] -> attribute -> n names. fingerprint:
    of the weights it judges with, None if they are not known. size: (height, width) of the images
    it reads, None for any.

        Judge("tone", None, lambda images: {"tone": ["bright"] * len(images)})
    """

    name: str
    fingerprint: str | None
    function: Names
    size: tuple[int, int] | None = None

    def __call__(self, images: Tensor) -> Mapping[str, Sequence[str]]:
        return self.function(images)

    def to_json(self) -> dict[str, str | None]:
        """What a provenance says of it."""
        return {"name": self.name, "fingerprint": self.fingerprint}


def judge_of(judge: Judge | Names, known: Judge | None = None) -> Judge:
    """`judge` by name; any function will do. known: a judge whose function it may be.

    Raises TypeError for what is no function.
    """
    if known is not None and judge in (known, known.function):
        return known
    if isinstance(judge, Judge):
        return judge
    if not callable(judge):
        raise TypeError(
            f"judge {judge!r} is no function images [n, 3, H, W] -> attribute -> n names: leave it "
            "out for CLIP-Score"
        )
    return Judge(getattr(judge, "__qualname__", type(judge).__qualname__), None, judge)
