"""Makes the clone importable as ``svdq`` and ComfyUI importable as itself; the options and skips of the suite."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"

# pytest and `python -m` may put the clone on the path, where our `nodes` would hide ComfyUI's.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

if "svdq" not in sys.modules:
    # An empty package whose path is the root: the root's own __init__.py is ComfyUI's entry point and is not run here.
    package = types.ModuleType("svdq")
    package.__path__ = [str(ROOT)]
    sys.modules["svdq"] = package

pytest_plugins = ["server_fixture"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests that need an NVIDIA GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = _no_gpu_reason(config)
    if reason is not None:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu_reason(config: pytest.Config) -> str | None:
    if not config.getoption("--gpu"):
        return "needs an NVIDIA GPU: run with --gpu on a machine that has one"
    import torch

    return None if torch.cuda.is_available() else "torch sees no NVIDIA GPU"


def find_comfyui() -> Path | None:
    """ComfyUI's folder: COMFYUI_PATH, else the one around this pack, else the one in .venv."""
    from svdq.cli.environment import comfyui_path

    path = comfyui_path()
    return path if (path / "comfy").is_dir() else None


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of data made by the original tools."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden data at {GOLDEN}")
    return GOLDEN


@pytest.fixture(scope="session")
def comfy() -> types.ModuleType:
    """ComfyUI's package ``comfy``, imported into this process; on the CPU where there is no GPU."""
    path = find_comfyui()
    if path is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH, or run `python3 . test`, which installs one")
    for requirement in ("comfy_kitchen", "comfy_aimdo"):
        if importlib.util.find_spec(requirement) is None:
            pytest.skip(f"ComfyUI's requirement {requirement} is not installed")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    import torch

    if "comfy.cli_args" not in sys.modules:
        # ComfyUI reads its options from the command line, which is pytest's here.
        argv, sys.argv = sys.argv, ["main.py"] + ([] if torch.cuda.is_available() else ["--cpu"])
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args

        sys.argv = argv
    import comfy.sd
    import comfy.utils

    # The models of tests are so small that two threads wait for each other longer than they compute.
    torch.set_num_threads(1)
    return sys.modules["comfy"]


@pytest.fixture(scope="session")
def tiny(comfy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.1-dev checkpoint with random weights, which tests only read."""
    from svdq.cli.synth import synth

    path = tmp_path_factory.mktemp("tiny") / "dev.safetensors"
    synth(path, variant="dev", scale="tiny", seed=3)
    return path
