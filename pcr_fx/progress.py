"""What takes long says what it is: in the log, and on a terminal as a bar where tqdm is installed."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

from pcr_fx.locks import fork_safe_lock

log = logging.getLogger(__name__)

# Seconds after which something takes long, and between two looks of its bar.
_PATIENCE, _TICK = 2.0, 0.5

# Held by the one stage that has a bar.
_terminal = fork_safe_lock()


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Say what is being done, once that has taken two seconds, and what it took in the end.

    Args:
        what: in words that may follow "pcr_fx is": "compiling a kernel".
    """
    ended, began = threading.Event(), time.perf_counter()
    timer = threading.Timer(_PATIENCE, _tell, (what, ended))
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # no thread starts where memory is short, or while Python ends
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        ended.set()
        seconds = time.perf_counter() - began
        if seconds >= _PATIENCE:
            log.info("done with %s after %.1f s", what, seconds)


def _tell(what: str, ended: threading.Event) -> None:
    """In a thread of its own: what goes wrong here is nobody's concern."""
    if ended.is_set():
        return
    log.info("still %s", what)
    if _terminal.acquire(blocking=False):
        try:
            with contextlib.suppress(Exception):
                _draw(what, ended)
        finally:
            _terminal.release()


def _draw(what: str, ended: threading.Event) -> None:
    """A bar without an end, as nobody knows it, until what it is of has ended."""
    if not sys.stderr.isatty():
        return
    from tqdm import tqdm

    with tqdm(desc=f"pcr_fx is {what}", bar_format="{desc} [{elapsed}]", leave=False, file=sys.stderr) as bar:
        while not ended.wait(_TICK):
            bar.refresh()
