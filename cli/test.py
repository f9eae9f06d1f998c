"""``test``: style check and all tests that this machine can run."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from . import EXIT_INTERRUPTED, ROOT

_SLOWEST = ("--durations=10", "--durations-min=1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``test``; whatever is not known here goes to pytest."""
    parser.usage = f"{parser.prog} [-h] [--gpu] [pytest's options and paths from the root of the clone ...]"
    parser.add_argument("--gpu", action="store_true", help="also run the tests that need an NVIDIA GPU")
    parser.set_defaults(passed_on=[])


def run(args: argparse.Namespace) -> int:
    """Run ruff and pytest; the exit code is 0 only if both are content."""
    # pytest's settings name folders relative to the root.
    os.chdir(ROOT)
    check = [sys.executable, "-m", "ruff", "check", "."]
    ruff = subprocess.run(check, stdin=subprocess.DEVNULL, check=False).returncode
    print(f"ruff: {'passed' if ruff == 0 else 'FAILED, see above'}", flush=True)

    # In this process: "python -m pytest" would put the clone on sys.path, where our nodes hide ComfyUI's.
    import pytest

    code = int(pytest.main([*_SLOWEST, *(["--gpu"] if args.gpu else []), *args.passed_on]))
    print(f"{time.time() - args.started:.0f} s in all{'' if ruff == 0 else '; ruff FAILED'}", flush=True)
    if code == pytest.ExitCode.INTERRUPTED:
        return EXIT_INTERRUPTED
    return code or ruff
