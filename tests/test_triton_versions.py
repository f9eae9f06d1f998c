"""The oldest and the newest Triton that the kernels support compile them too (all other tests have the suite's own).

Each is downloaded once (170 and 290 MB; 0.6 and 1 GB on disk) into a folder of its own, which a second process has
first on its path. That process runs this file: it compiles CASES and prints what came out of it. No GPU is needed.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("triton")

from test_gemm_int4 import INSTRUCTIONS_PER_MMA_ELSEWHERE

from svdq.benchmarks import sass
from svdq.cli import UserError
from svdq.cli.console import StatusLine
from svdq.cli.pip_runner import run_pip
from svdq.kernels.epilogue import KINDS
from svdq.kernels.tiles import TILES, choose_tile

VERSIONS = ("3.5.1", "3.9.0")
NO_SPILLS = "gemm plain"  # what such cases start with

pytestmark = pytest.mark.slow


def _cases() -> dict[str, tuple[str, dict]]:
    """Name -> (function of sass.py, arguments)."""
    cases: dict[str, tuple[str, dict]] = {}
    # sm_89 has the tiles of sm_86.
    for arch, tiles in (("sm_80", TILES["sm_80"]), ("sm_86", TILES["sm_86"]), ("sm_89", TILES["sm_89"][:1])):
        for tile in tiles:
            for unsigned in (False, True):
                name = f"{NO_SPILLS} {'u4' if unsigned else 's4'} {tile.block_m}x{tile.block_n} {arch}"
                cases[name] = "gemm_int4_figures", {"tile": tile, "arch": arch, "act_unsigned": unsigned}
    for after in KINDS[1:]:
        tile = choose_tile(4608, 9216, "sm_86", epilogue=after)
        cases[f"gemm {after} sm_86"] = "gemm_int4_figures", {"tile": tile, "arch": "sm_86", "after": after}
    tile = choose_tile(4608, 12288, "sm_86", epilogue="GELU_QUANTIZE")
    cases["gemm GELU_QUANTIZE sm_86"] = "gemm_gelu_quantize_figures", {"tile": tile, "arch": "sm_86"}
    for after in ("NONE", "GATE_RESIDUAL"):
        arguments = {"tile": choose_tile(4608, 3072, "sm_86"), "arch": "sm_86", "parts": 2, "after": after}
        cases[f"gemm of two inputs {after} sm_86"] = "gemm_int4_figures", arguments
    for arch in ("sm_80", "sm_89"):
        cases[f"quantize {arch}"] = "quantize_figures", {"arch": arch}
    for arch in ("sm_86", "sm_90"):
        cases[f"quantize int8 {arch}"] = "quantize_int8_figures", {"arch": arch, "norm": True}
    cases["quantize unsigned, rank 0, sm_86"] = "quantize_figures", {"arch": "sm_86", "act_unsigned": True, "rank": 0}
    for arch in ("sm_80", "sm_89"):
        cases[f"gemv {arch}"] = "gemv_figures", {"arch": arch}
        cases[f"error feedback {arch}"] = "feedback_figures", {"arch": arch, "steps": 6}
    return cases


CASES = _cases()


def print_figures() -> None:
    """What the other process does: one line of JSON, {"triton": version, "figures": {name: figures, or the error}}."""
    import triton

    figures: dict[str, dict | str] = {}
    for name, (function, arguments) in CASES.items():
        try:
            figures[name] = vars(getattr(sass, function)(**arguments))
        except Exception:  # whatever a compiler raises is the result of this case
            figures[name] = traceback.format_exc()[-3000:]
    print(json.dumps({"triton": triton.__version__, "figures": figures}))


def compile_with(version: str) -> dict[str, dict | str]:
    """Figures of all CASES with this Triton; raises UserError if it cannot be had."""
    path = [str(installed(version)), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, __file__], env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"Triton {version} ended with {done.returncode}:\n{done.stderr[-3000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["triton"] == version
    return result["figures"]


def installed(version: str) -> Path:
    """The folder that holds this Triton for this Python, complete or not there at all."""
    home = triton_home()
    folder = home / f"{version}-{sys.implementation.cache_tag}"
    if folder.is_dir():
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=f".{folder.name}-") as temporary:
            site = Path(temporary) / "site"
            where = ["--target", str(site), "--no-deps", "--no-compile", "--only-binary", ":all:"]
            run_pip(
                Path(sys.executable),
                ["install", *where, "--retries", "1", "--timeout", "20", f"triton=={version}"],
                log=home / f"{folder.name}.log",
                status=StatusLine(io.StringIO()),
                temporary=Path(temporary) / "tmp",
            )
            try:
                site.rename(folder)
            except OSError:
                if not folder.is_dir():  # it is if another run of the tests was faster
                    raise
    except OSError as error:
        raise UserError(f"{type(error).__name__}: {error}") from error
    return folder


def triton_home() -> Path:
    """In the clone's .venv if that runs the tests, else in the person's cache: nobody else's environment is changed."""
    if Path(sys.prefix).resolve() == (ROOT / ".venv").resolve():
        return ROOT / ".venv" / "triton"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svdq-flux" / "triton"


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, Future]]:
    """Version -> future of compile_with; all at work at once, in about 0.7 GB of memory each."""
    with ThreadPoolExecutor(len(VERSIONS)) as pool:
        yield {version: pool.submit(compile_with, version) for version in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_compiles_lean(name: str, version: str, compiled: dict[str, Future]) -> None:
    try:
        figures = compiled[version].result()[name]
    except UserError as error:
        pytest.skip(f"Triton {version} cannot be had: {error}")
    assert isinstance(figures, dict), figures
    if name.startswith("gemm"):
        assert figures["mmas"] > 0
        assert figures["instructions_per_mma"] <= INSTRUCTIONS_PER_MMA_ELSEWHERE
    if name.startswith(NO_SPILLS):
        assert figures["spill_bytes"] == 0


if __name__ == "__main__":
    print_figures()
