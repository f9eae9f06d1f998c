"""Starts the real ComfyUI, headless and cut off from the network, with this pack installed as a custom node."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import ROOT
from .comfy_client import ComfyClient, ComfyError
from .environment import comfyui_of_user, comfyui_path

# A node that is registered if and only if the pack was imported.
_WITNESS_NODE = "SVDQFluxLoader"
# Runs a command such that Linux ends it with the thread that started it, which SIGKILL gives no time to do so itself:
# PR_SET_PDEATHSIG outlives exec. A starter that is gone before that is no longer the parent.
_TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
_NOT_SHIPPED = (".git", ".venv", "venv", "out", "__pycache__", ".pytest_cache", ".ruff_cache", "*.pyc")


class ServerFailed(ComfyError):
    """ComfyUI did not start, stopped by itself, or started without this pack."""


class ComfyServer:
    """A running ComfyUI; use as a context manager. ``client`` talks to it.

    On Linux it also ends when the thread that started it does, whatever ended that.

    Args:
        base_directory: holds models, input, output, user and custom_nodes of this server; made if absent.
        comfyui: ComfyUI's source folder; default: the person's own or the one in ``.venv``.
        python: interpreter to run it with.
        cpu: force CPU (True) or GPU (False); None lets torch decide.
        extra_arguments: more of ComfyUI's own options.
        model_folders: folder kind ("vae", "diffusion_models", ...) -> more folders to look for such models in.
        pack_name: name of the pack's folder in custom_nodes; default: the name of this clone.
        install_pack: False leaves custom_nodes as it is.
        log: where ComfyUI's output goes; default: comfyui.log in the base directory.
        start_timeout: seconds until a server that does not answer counts as failed.
        environ: variables to set for it.
    """

    def __init__(
        self,
        base_directory: Path,
        *,
        comfyui: Path | None = None,
        python: Path | None = None,
        cpu: bool | None = None,
        extra_arguments: Sequence[str] = (),
        model_folders: Mapping[str, Sequence[Path]] | None = None,
        pack_name: str | None = None,
        install_pack: bool = True,
        log: Path | None = None,
        start_timeout: float = 180.0,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.base_directory = Path(base_directory).absolute()
        self.comfyui = Path(comfyui or comfyui_path())
        self.python = Path(python or sys.executable)
        self.cpu = cpu
        self.log = Path(log or self.base_directory / "comfyui.log")
        self.pack_directory = self.base_directory / "custom_nodes" / (pack_name or ROOT.name)
        self.client = ComfyClient("http://127.0.0.1:0")
        self._extra_arguments = list(extra_arguments)
        self._model_folders = dict(model_folders or {})
        self._install_pack = install_pack
        self._start_timeout = start_timeout
        self._more_environ = dict(environ or {})
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return self.client.url

    def start(self) -> None:
        """Install the pack, start ComfyUI and wait until it answers; raises ServerFailed with the reason if not."""
        for name in ("models", "input", "output", "user", "custom_nodes"):
            (self.base_directory / name).mkdir(parents=True, exist_ok=True)
        if self._install_pack:
            install_pack(ROOT, self.pack_directory)
        port = _free_port()
        self.client = ComfyClient(f"http://127.0.0.1:{port}")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._tied_to_us(self._command(port)),
                cwd=self.base_directory,
                env=self._environ(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own: one signal ends it with everything it started, and Ctrl-C reaches only us.
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
            if self._install_pack:
                self._check_pack_is_registered()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End ComfyUI and everything it started."""
        process, self._process = self._process, None
        if process is None:
            return
        if os.name != "posix":
            process.kill()
            process.wait()
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            # The kill takes what is left of the group when the server itself is gone.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10.0)

    def is_running(self) -> bool:
        """True while the process lives."""
        return self._process is not None and self._process.poll() is None

    def exit_reason(self) -> str:
        """One line on why the process ended, then the end of its log."""
        code = None
        if self._process is not None:
            # Its connections break a moment before it is gone.
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(5.0)
        killed = " (killed; the machine may have run out of memory)" if code == -9 else ""
        return f"ComfyUI stopped with exit code {code}{killed}; full log: {self.log}\n{self.log_tail()}"

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of ComfyUI's log."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def log_text(self) -> str:
        """ComfyUI's log so far, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(encoding="utf-8", errors="replace"))

    def _command(self, port: int) -> list[str]:
        base = self.base_directory
        command = [str(self.python), str(self.comfyui / "main.py"), "--base-directory", str(base)]
        command += ["--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"]
        if self.cpu if self.cpu is not None else not has_accelerator():
            command.append("--cpu")
        folders = {kind: list(paths) for kind, paths in self._model_folders.items()}
        for kind, path in _models_of_user().items():
            folders.setdefault(kind, []).append(path)
        if folders:
            config = base / "extra_model_paths.yaml"
            section = {kind: "\n".join(str(path) for path in paths) for kind, paths in folders.items()}
            # JSON is YAML too, and quotes any path correctly.
            config.write_text(json.dumps({"svdq": section}, indent=1), encoding="utf-8")
            command += ["--extra-model-paths-config", str(config)]
        return command + self._extra_arguments

    def _tied_to_us(self, command: list[str]) -> list[str]:
        if sys.platform != "linux":
            return command
        return [str(self.python), "-I", "-S", "-c", _TIED, str(os.getpid()), *command]

    def _environ(self) -> dict[str, str]:
        environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        environ |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        if comfyui_of_user() is not None:
            # Nothing of ours goes into the person's folders, bytecode neither.
            environ["PYTHONDONTWRITEBYTECODE"] = "1"
        return environ | self._more_environ

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        while True:
            if not self.is_running():
                raise ServerFailed(self.exit_reason())
            try:
                self.client.system_stats()
                return
            except (urllib.error.URLError, OSError):
                if time.monotonic() > deadline:
                    raise ServerFailed(
                        f"ComfyUI did not answer within {self._start_timeout:.0f} s; log: {self.log}\n{self.log_tail()}"
                    ) from None
                time.sleep(0.1)

    def _check_pack_is_registered(self) -> None:
        if _WITNESS_NODE not in self.client.object_info(_WITNESS_NODE):
            found = (import_error(self.log_text()) or "the log does not say why").strip()
            raise ServerFailed(f"ComfyUI could not load this pack: {found.splitlines()[-1]}; log: {self.log}\n{found}")


def install_pack(source: Path, target: Path) -> None:
    """Copy what a git clone of ``source`` would hold to ``target``, replacing what is there."""
    shutil.rmtree(target, ignore_errors=True)
    files = _files_of_checkout(source)
    if files is None:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*_NOT_SHIPPED))
        return
    for name in files:
        # A tracked file may be deleted in the working tree.
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def has_accelerator() -> bool:
    """True if torch sees a GPU that ComfyUI can use."""
    import torch

    return torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()


def import_error(log: str) -> str | None:
    """The traceback that ComfyUI logged when a custom node pack could not be imported."""
    found = re.search(r"(Traceback \(most recent call last\):\n(?:(?!Traceback).*\n)*?)?.*Cannot import .*", log)
    return (found or re.search(r"Error while calling comfy_entrypoint.*", log) or [None])[0]


def _files_of_checkout(source: Path) -> list[str] | None:
    """Tracked and new files that git does not ignore; None if ``source`` is not the top of a git checkout."""
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        # No git here, or it refuses a folder that somebody else owns.
        return None
    return os.fsdecode(listed.stdout).rstrip("\0").split("\0")


def _models_of_user() -> dict[str, Path]:
    """The model folders of the person's ComfyUI; its extra_model_paths.yaml is read by ComfyUI itself."""
    comfyui = comfyui_of_user()
    models = comfyui / "models" if comfyui is not None else None
    if models is None or not models.is_dir():
        return {}
    return {folder.name: folder for folder in sorted(models.iterdir()) if folder.is_dir()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
