"""A picture, a bar and a Cancel: what is painted in the background, as it is seen."""

import html
import time
from collections.abc import Callable
from typing import Any

from .jobs import Cancelled, Job, wait_for
from .results import Made


class Painter:
    """The picture of an explorer and the job that paints it.

    make(chosen) -> Made, called in the background; show(chosen, made) -> HTML. The newest request
    counts: an earlier one that is still being painted is cancelled.
    """

    def __init__(self, make: Callable[[Any], Made], show: Callable[[Any, Made], str]) -> None:
        import ipywidgets

        self.make, self.html_of, self.told = make, show, 0.0
        self.job: Job | None = None
        self.picture = ipywidgets.HTML()
        self.status = ipywidgets.HTML()
        self.bar = ipywidgets.IntProgress(0, 0, 1, layout={"width": "12em"})
        self.button = ipywidgets.Button(
            description="Cancel", disabled=True, tooltip="Stop painting before its next step"
        )
        self.button.on_click(lambda _: self.cancel())
        self.box = ipywidgets.VBox(
            [ipywidgets.HBox([self.button, self.bar, self.status]), self.picture]
        )

    def show(self, chosen: Any, made: Made) -> None:
        """Show a picture that is there."""
        self.picture.value = self.html_of(chosen, made)
        self._say("")

    def request(self, chosen: Any) -> None:
        """Show the picture of `chosen`, painting it in the background if it is not there yet."""
        self.cancel()

        def tell(what: str, done: int, total: int) -> None:
            if self.job is job and (done == total or time.monotonic() - self.told > 0.1):
                self.told = time.monotonic()
                self.bar.max, self.bar.value = max(total, 1), done
                self._say(f"{what}, step {done} of {total}")

        def finish(made: Made | None, error: BaseException | None) -> None:
            if self.job is not job:
                return
            if made is not None:
                self.show(chosen, made)
            elif isinstance(error, Cancelled):
                self._say("cancelled; the picture is the one before")
            else:
                self._say(f"{type(error).__name__}: {error}")
            self.button.disabled, self.bar.value = True, 0

        self.job = job = Job(lambda: self.make(chosen), tell, finish)
        self.button.disabled = False
        self._say("painting")
        job.start()

    def cancel(self) -> None:
        """Stop what is being painted before its next step."""
        if self.job is not None:
            self.job.cancel()

    def wait(self) -> None:
        """Return when nothing is being painted any more, also in the cell that asked for it."""
        if self.job is not None:
            wait_for(self.job)

    def _say(self, text: str) -> None:
        self.status.value = f'<span role="status">{html.escape(text)}</span>'
