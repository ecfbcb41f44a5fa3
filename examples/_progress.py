"""A progress bar: rich's where it is installed and the output is a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

PLAIN_LINES = 6


@contextlib.contextmanager
def bar(total: int) -> Iterator[Callable[[str], None]]:
    """Gives a function that is called with a text after each of the `total` pieces of work."""
    try:
        import rich.progress as rich
    except ImportError:
        rich = None  # type: ignore[assignment]
    if rich is None or not sys.stdout.isatty():
        yield _plain(total)
        return
    columns = (
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.description}"),
    )
    with rich.Progress(*columns) as progress:
        task = progress.add_task("", total=total)
        yield lambda text: progress.update(task, advance=1, description=text)


def _plain(total: int) -> Callable[[str], None]:
    done = 0

    def advance(text: str) -> None:
        nonlocal done
        done += 1
        if done == total or done * PLAIN_LINES // total > (done - 1) * PLAIN_LINES // total:
            filled = 30 * done // total
            print(f"[{'#' * filled}{'.' * (30 - filled)}] {done}/{total}  {text}", flush=True)

    return advance
