"""Runs pip with its output in a log, progress on one line, and one clear line when it fails."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import UserError
from .console import StatusLine

# Settings of a person's shell that would send packages somewhere else than into the given environment.
_MISLEADING_SETTINGS = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_REQUIRE_VIRTUALENV")

_COLLECTING = re.compile(r"^Collecting ([A-Za-z0-9._-]+)")
_FETCHING = re.compile(r"^\s*(Downloading|Using cached) (\S+?\.(?:whl|tar\.gz)) \(([^)]+)\)")
_BYTES = re.compile(r"^Progress (\d+) of (\d+)")
_LARGE_DOWNLOAD = 50_000_000

# What pip's log says -> what a person needs to know. The first match wins.
_FAILURES = (
    (r"DO NOT MATCH THE HASHES", "a download is not the file it should be (its sha256 differs), so it was not used"),
    (r"No space left on device|Errno 28", "the disk is full; free some space"),
    (
        r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError|ConnectionResetError"
        r"|RemoteDisconnected|ProtocolError|Network is unreachable|Failed to establish a new connection"
        r"|Temporary failure in name resolution|Max retries exceeded|Connection refused|IncompleteRead",
        "the package index cannot be reached; check the network",
    ),
    (r"SSLError|CERTIFICATE_VERIFY_FAILED", "the package index's certificate is not trusted; check proxy and clock"),
    (r"Permission denied|Errno 13", "a file cannot be written; check the permissions of the clone"),
    (r"No matching distribution found|Could not find a version", "the package index lacks a pinned version"),
)


def run_pip(
    python: Path,
    arguments: Sequence[str],
    *,
    log: Path,
    status: StatusLine,
    temporary: Path,
    inherited: Sequence[int] = (),
) -> None:
    """Run ``python -m pip ARGUMENTS``; raises ``UserError`` with one line and the log's name if it fails.

    Args:
        temporary: folder for downloads in progress, on the disk of the environment: /tmp may be a small RAM disk.
        inherited: file descriptors that pip keeps open, so that a lock outlives us if only we are killed.
    """
    command = [str(python), "-I", "-m", "pip", *arguments, "--no-color", "--disable-pip-version-check", "--no-input"]
    environ = {name: value for name, value in os.environ.items() if name not in _MISLEADING_SETTINGS}
    temporary.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as log_file:
        start = log_file.tell()
        log_file.write(f"\n$ {' '.join(command)}\n")
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environ | {"TMPDIR": str(temporary)},
            encoding="utf-8",
            errors="replace",
            pass_fds=tuple(inherited) if os.name == "posix" else (),
        ) as process:
            try:
                progress = _Progress(status)
                for line in _lines(process):
                    if line is not None and not _BYTES.match(line):
                        log_file.write(line)
                        log_file.flush()
                    progress.feed(line)
            except BaseException:
                process.terminate()
                raise
    if process.returncode != 0:
        with log.open(encoding="utf-8") as log_file:
            log_file.seek(start)
            raise UserError(f"{explain_failure(log_file.read())} (details: {log})")


def explain_failure(output: str) -> str:
    """One line for what stopped pip, from what it printed."""
    for pattern, meaning in _FAILURES:
        if re.search(pattern, output):
            return meaning
    errors = re.findall(r"^ERROR: (.+)$", output, flags=re.MULTILINE)
    return f"pip failed: {errors[-1]}" if errors else "pip failed"


def _lines(process: subprocess.Popen[str]) -> Iterator[str | None]:
    """Lines as they come, and ``None`` once a second while there is none, so that a clock can tick."""
    arrived: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            arrived.put(line)
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = arrived.get(timeout=1.0)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


class _Progress:
    """Turns pip's output into a status line: what is being fetched, how much so far, how long already."""

    def __init__(self, status: StatusLine) -> None:
        self._status = status
        self._started = time.monotonic()
        self._doing = "starting pip"
        self._collected = 0
        self._fetched = 0
        self._current = 0

    def feed(self, line: str | None) -> None:
        """Take one line of output (or None for a tick) and show where things stand."""
        important = self._read(line) if line else False
        seconds = time.monotonic() - self._started
        megabytes = (self._fetched + self._current) / 1e6
        amount = f", {megabytes:.0f} MB so far" if megabytes >= 1 else ""
        self._status.update(f"      {self._doing}{amount} ({seconds:.0f} s)", important=important)

    def _read(self, line: str) -> bool:
        """Update the state; True if this is news that should be seen even where lines are sparse."""
        if match := _BYTES.match(line):
            self._current = int(match[1])
            return False
        if match := _COLLECTING.match(line):
            self._collected += 1
            self._doing = f"resolving: {match[1]} ({self._collected})"
        elif match := _FETCHING.match(line):
            self._fetched += self._current
            self._current = 0
            name = "-".join(match[2].split("-")[:2])
            self._doing = f"{'downloading' if match[1] == 'Downloading' else 'from cache:'} {name} ({match[3]})"
            return match[1] == "Downloading" and _size_in_bytes(match[3]) >= _LARGE_DOWNLOAD
        elif line.startswith("Installing collected packages"):
            self._fetched += self._current
            self._current = 0
            self._doing = f"unpacking (packages: {line.count(',') + 1})"
            return True
        elif line.startswith("WARNING: Retrying"):
            self._doing = "the package index does not answer, trying again"
            return True
        return False


def _size_in_bytes(text: str) -> float:
    """``530.6 MB`` -> 530600000.0, as pip prints sizes."""
    number, unit = text.split()
    return float(number) * {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}.get(unit, 1)
