"""Command line: finds the command, the Python that runs it, and turns expected errors into one line.

A command is a module of this package with ``add_arguments(parser)`` and ``run(args) -> int``. Its top level imports
the standard library only, so that ``--help`` answers before anything is installed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# Links are kept: by one the pack may lie in a ComfyUI's custom_nodes.
ROOT = Path(__file__).absolute().parent.parent

COMMANDS = {
    "demo": "make a picture with ComfyUI and an INT4 FLUX checkpoint (installs what it needs into .venv)",
    "test": "run all tests that this machine can run (--gpu adds the GPU tests)",
    "doctor": "show GPU, driver, torch, ComfyUI and the backend that would be used, with a remedy per problem",
    "inspect": "say what is in a checkpoint and how it would run here",
    "dequantize": "write the effective 16-bit or float32 weights under ComfyUI's FLUX names",
    "convert": "write an INT4 checkpoint in another format, or with LoRAs baked in",
    "quantize": "make an INT4 checkpoint from a 16-bit FLUX.1 model (can be interrupted and gone on with)",
    "synth": "write a valid checkpoint with random weights, for tests and benchmarks",
    "bench": "print figures of the kernels (--static: for GPUs that are not in this machine), whole steps, quality",
}

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

# Holds the time of the first start in the process that we replace ourselves with; it does not look for a Python again.
RESTARTED = "SVDQ_CLI_STARTED"


class UserError(Exception):
    """Something that the person at the keyboard can put right; shown without a traceback.

    The first line is the message. Further lines (the end of a log) are shown before it.
    """

    def __init__(self, message: str, exit_code: int = EXIT_USER_ERROR) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see: {self.prog} --help)")


def main(argv: Sequence[str]) -> int:
    """Run one command line and return the exit code."""
    # Without this a TERM or HUP would skip every "finally" and leave a ComfyUI server behind.
    for name in ("SIGTERM", "SIGHUP"):
        # A signal that is ignored (nohup) stays ignored.
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_DFL:
            signal.signal(getattr(signal, name), _exit_on_signal)
    try:
        return _dispatch(list(argv))
    except KeyboardInterrupt:
        _complain("interrupted; run the same command again to go on")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) is gone; Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_USER_ERROR
    except _expected_errors() as error:
        line, *details = str(error).splitlines() or [type(error).__name__]
        for detail in details:
            _complain(detail)
        _complain(f"error: {line}")
        return getattr(error, "exit_code", EXIT_USER_ERROR)


def _dispatch(argv: list[str]) -> int:
    program = f"python3 {_clone_as_typed()}"
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview(program))
        return 0 if argv else EXIT_USER_ERROR
    command, *rest = argv
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}; choose one of: {', '.join(COMMANDS)}")

    module = importlib.import_module(f".{command}", __name__)
    parser = _Parser(prog=f"{program} {command}", description=COMMANDS[command], allow_abbrev=False)
    module.add_arguments(parser)
    args, unknown = parser.parse_known_args(rest)
    if hasattr(args, "passed_on"):
        args.passed_on = unknown
    elif unknown:
        parser.error(f"unknown argument: {' '.join(unknown)}")

    from . import environment

    started = os.environ.pop(RESTARTED, None)
    args.started = float(started or time.time())
    python = environment.python_for(command) if started is None else None
    if python is not None:
        return _restart(python, argv, args.started)
    environment.check_modules(command)
    return module.run(args)


def _restart(python: Path, argv: list[str], started: float) -> int:
    """Run the same command under ``python``; on POSIX in this very process, so that signals just work."""
    arguments = [str(python), str(ROOT / "__main__.py"), *argv]
    environ = {**os.environ, RESTARTED: str(started)}
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execve(python, arguments, environ)
    return subprocess.call(arguments, env=environ)


def _overview(program: str) -> str:
    lines = [f"usage: {program} COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<11} {summary}" for name, summary in COMMANDS.items()]
    lines += ["", f"{program} COMMAND --help shows a command's options."]
    lines += ["In the custom_nodes of your ComfyUI, or with COMFYUI_PATH set to it, they use that and its Python;"]
    lines += ["elsewhere they install what they need into .venv."]
    return "\n".join(lines)


def _clone_as_typed() -> str:
    return "." if Path.cwd() == ROOT.resolve() else str(ROOT)


def _expected_errors() -> tuple[type[BaseException], ...]:
    """Errors about the person's files or machine; CheckpointError exists once a command imported the loaders."""
    loaders = sys.modules.get(f"{__package__.rpartition('.')[0]}.loaders")
    return (UserError, OSError, *([loaders.CheckpointError] if loaders else []))


def _complain(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)
