"""What a run says while it works: a progress bar per stage, two lines after it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

ProgressCallback = Callable[[str, int, int], None]
"""Called as `progress(what is being done, how many are done, how many there are)`."""

# A log file gets a line this often instead of a moving bar.
_SECONDS_BETWEEN_LINES = 30.0


class RunConsole:
    """Tells a person how a run goes; on a terminal with bars, in a log file with a line now and then.

    Args:
        quiet: Say nothing, as a library should.
        console: Where to write; standard output by default.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.console.quiet = quiet or self.console.quiet

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[ProgressCallback]:
        """Show the progress of a stage for the length of a block.

        Yields:
            What the stage calls as its work gets on; each new description starts a bar of its own.
        """
        with (
            _Bars(title, self.console)
            if self.console.is_terminal
            else _Lines(title, self.console) as progress
        ):
            yield progress

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show that something is going on that has no steps to count, for the length of a block."""
        with self.console.status(escape(what)) if self.console.is_terminal else contextlib.nullcontext():
            yield

    def summary(self, title: str, result: str, detail: str) -> None:
        """Say in two lines what a stage came to."""
        self.console.print(f"[bold green]{escape(title):<14}[/] {escape(result)}")
        self.console.print(f"{'':<14} [dim]{escape(detail)}[/]")

    def note(self, text: str) -> None:
        """Say something that is neither progress nor a result."""
        self.console.print(f"[yellow]{escape(text)}[/]")


class _Bars:
    """Progress bars on a terminal, gone when the stage is over."""

    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._doing = ""

    def __enter__(self) -> ProgressCallback:
        self._progress.start()
        self._task = self._progress.add_task(self._title, total=None)
        return self._update

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def _update(self, doing: str, done: int, total: int) -> None:
        assert self._task is not None
        # What follows a colon changes from step to step (a loss, say); a new text before it is new work.
        if doing.split(":")[0] != self._doing.split(":")[0]:
            self._progress.reset(self._task)
        self._doing = doing
        self._progress.update(
            self._task, description=f"{self._title}: {escape(doing)}", completed=done, total=total or None
        )


class _Lines:
    """Progress in a log file: a line when half a minute has passed since the last."""

    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._console = console
        self._last = time.monotonic()

    def __enter__(self) -> ProgressCallback:
        return self._update

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def _update(self, doing: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            what, _, detail = doing.partition(": ")
            self._console.print(escape(f"{self._title}: {what} {done}/{total} {detail}".rstrip()))
