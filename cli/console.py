"""What a person sees while something takes long: numbered steps and one status line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_QUIET_SECONDS = 15.0
_REDRAW_SECONDS = 0.1


class StatusLine:
    """One line that changes: redrawn in place on a terminal, elsewhere printed now and then."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self._in_place = self.stream.isatty()
        self._last_text = ""
        self._last_time = 0.0

    def update(self, text: str, *, important: bool = False) -> None:
        """Show ``text``; ``important`` lines are never dropped, others only when enough time has passed."""
        wait = _REDRAW_SECONDS if self._in_place else _QUIET_SECONDS
        if text == self._last_text or (not important and time.monotonic() - self._last_time < wait):
            return
        self._last_text, self._last_time = text, time.monotonic()
        if self._in_place:
            self.stream.write(f"\r\x1b[2K{text[: _terminal_width() - 1]}")
        else:
            self.stream.write(f"{text}\n")
        self.stream.flush()

    def clear(self) -> None:
        """Take the line away, so that ordinary output can follow."""
        if self._in_place and self._last_text:
            self.stream.write("\r\x1b[2K")
            self.stream.flush()
        self._last_text = ""
        self._last_time = time.monotonic()


@contextmanager
def step(title: str, stream: TextIO | None = None) -> Iterator[StatusLine]:
    """Announce a step, hand out a status line for it, and report how long it took."""
    stream = stream or sys.stdout
    print(title, file=stream, flush=True)
    started = time.monotonic()
    status = StatusLine(stream)
    # What was just announced counts as output: a first status line may wait.
    status.clear()
    try:
        yield status
    finally:
        status.clear()
    print(f"      done in {time.monotonic() - started:.1f} s", file=stream, flush=True)


def _terminal_width() -> int:
    import shutil

    return shutil.get_terminal_size().columns
