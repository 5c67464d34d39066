"""Progress of long work: a bar where somebody watches, plain lines where a log is kept.

tqdm's notebook bar freezes at 0 % under papermill and its plain bar floods the log, so headless runs print
a line at most every few seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def interactive() -> bool:
    """True in a terminal, or in a notebook that a person drives (papermill sets no `input` hook)."""
    try:
        from IPython import get_ipython
    except ImportError:
        return sys.stderr.isatty()
    shell = get_ipython()
    if shell is None:
        return sys.stderr.isatty()
    kernel = getattr(shell, "kernel", None)
    # nbclient and papermill execute with allow_stdin=False; a browser allows it.
    return bool(getattr(kernel, "_allow_stdin", False))


def progress(
    items: Iterable[Item], total: int, label: str, *, done: int = 0, every: float = 5.0
) -> Iterator[Item]:
    """Yield `items`, showing how many of `total` are finished and the time left.

    Args:
        items: what to iterate over; only what is left to do.
        total: number of all items, `done` included.
        label: what is being done, e.g. "spectra".
        done: how many were finished earlier (a resumed run).
        every: seconds between two lines when headless.
    """
    if interactive():
        from tqdm.auto import tqdm

        yield from tqdm(items, total=total, initial=done, desc=label)
        return
    start = last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= every or done + count == total:
            left = (now - start) / count * (total - done - count)
            print(f"{label}: {done + count}/{total}, about {left:.0f} s left", flush=True)
            last = now
