"""Errors as a person wants them: one sentence, exit code 2, a traceback only with --debug."""

import contextlib
import errno
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.markup import escape

from safesteer.errors import SafeSteerError, one_line

USER_ERROR = 2
INTERNAL_ERROR = 1
INTERRUPTED = 130


@contextlib.contextmanager
def reported(*, debug: bool) -> Iterator[None]:
    """Turn errors of the block into a sentence on standard error and an exit code.

    Args:
        debug: Let every error through, traceback and all.

    Raises:
        typer.Exit: With 2 for what the user can mend, 1 for a fault of this program, 130 after Ctrl-C.
    """
    if debug:
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted; the same command continues the run.")
        raise typer.Exit(INTERRUPTED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        sentence = explanation(error)
        if sentence is None:
            what = f"unexpected {type(error).__name__}: {one_line(error, 400)}"
            _say(f"{what} (run again with --debug for the traceback)")
            raise typer.Exit(INTERNAL_ERROR) from None
        _say(sentence)
        raise typer.Exit(USER_ERROR) from None


def explanation(error: BaseException) -> str | None:
    """Say in one sentence what the user can do about an error; None if it is no fault of theirs."""
    if isinstance(error, SafeSteerError):
        return str(error)
    # Here, because --help fails at nothing and torch takes seconds to load.
    from safesteer.out_of_memory import is_out_of_memory

    if is_out_of_memory(error):
        return (
            "the device ran out of memory; lower --micro-batch-size, --direction-batch-size or "
            "--tokens-batch-size, add --gradient-checkpointing, or see --dry-run for what takes how much."
        )
    if not isinstance(error, OSError):
        return None
    what = error.filename or one_line(error)
    if error.errno == errno.ENOSPC:
        return f"the disk is full ({what}); free some space and run the same command again."
    if isinstance(error, FileNotFoundError):
        return f"{what}: no such file; check the path."
    if isinstance(error, PermissionError):
        return f"{what}: may not be read or written; choose another path or change its rights."
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return f"{what}: is a file where a folder is needed; choose another --output."
    if type(error).__module__.split(".")[0] in ("huggingface_hub", "requests", "httpx"):
        return f"the hub could not be reached ({one_line(error)}); check the network, or name a local folder."
    return None


def _say(sentence: str) -> None:
    # Names of a broken file's fields may hold anything: what a terminal would act on, or not print, is escaped.
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in " ".join(sentence.split()))
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]Error:[/] [red]{escape(shown)}[/]"
    )
