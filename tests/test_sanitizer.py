"""Kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("gpu_sanitize.py")
KERNELS = PROGRAM.parent.parent / "kernels"
_FOUND = 3  # exit code
_FRAME = ("COMPUTE-SANITIZER", "RACECHECK SUMMARY", "ERROR SUMMARY")  # what it prints around its reports


def findings(printed: str) -> list[str]:
    """The reports of compute-sanitizer but for those of Triton's warp specialization.

    Which partition a warp is to run next lies in shared memory; it is written before a barrier of all warps and read
    behind it. The warps reach that barrier at different instructions, and racecheck takes it for different barriers: it
    reports the same of a kernel that does nothing else ("warp specialization alone" in gpu_sanitize.py).
    """
    lines = [line.removeprefix("=========").strip() for line in printed.splitlines() if line.startswith("=========")]
    reports = "\n".join(line for line in lines if not line.startswith(_FRAME)).split("\n\n")
    return [report.strip() for report in reports if report.strip() and not _of_warp_specialization(report)]


def _of_warp_specialization(report: str) -> bool:
    """Whether all accesses are at the first line of a kernel or where it is divided among warps."""
    places = re.findall(r"(?:Read|Write) access at (\w+)\+0x[0-9a-f]+ in (\w+\.py):(\d+)", report)
    if "Race reported" not in report or len(places) != report.count("access at"):
        return False
    return all(_divides(kernel, file, int(line)) for kernel, file, line in places)


def _divides(kernel: str, file: str, line: int) -> bool:
    path = next((folder / file for folder in (KERNELS, PROGRAM.parent) if (folder / file).exists()), None)
    if path is None:
        return False
    text = path.read_text(encoding="utf-8").splitlines()[line - 1]
    return text.startswith(f"def {kernel}(") or text.strip().startswith("gl.warp_specialize(")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, which comes with the CUDA toolkit, is not on PATH")
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND), sys.executable, str(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    found = findings(done.stdout)
    assert not found, "\n\n".join(found)
    shown = f"{done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    assert "every case: ok" in done.stdout, shown
    assert done.returncode == 0 or (tool == "racecheck" and done.returncode == _FOUND), shown


def _race(*accesses: tuple[str, int]) -> str:
    """As racecheck prints one; accesses: (Read or Write, line of gluon_hopper.py)."""
    places = [f"{kind} access at gemm_w8a8_hopper_kernel+0x1d0 in gluon_hopper.py:{line}" for kind, line in accesses]
    others = [f"    and {place} [25 hazards]" for place in places[1:]]
    lines = [f"Error: Race reported between {places[0]}", *others, ""]
    return "".join(f"========= {line}\n" for line in lines)


def test_which_reports_count() -> None:
    lines = (KERNELS / "gluon_hopper.py").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines, 1) if line.startswith("def gemm_w8a8_hopper_kernel("))
    divided = next(i for i, line in enumerate(lines, 1) if "gl.warp_specialize(" in line)
    triton = _race(("Read", start), ("Write", start), ("Write", divided))
    ours = _race(("Read", start), ("Write", divided - 1))
    outside = "========= Invalid __global__ read of size 4 bytes\n=========     at gemv_kernel+0x40 in gemv.py:9\n"
    head = "========= COMPUTE-SANITIZER\ngemv 1: ok\n"
    tail = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    assert findings(head + tail) == findings(head + triton + triton + tail) == []
    assert len(findings(head + triton + ours + triton + tail)) == 1
    assert len(findings(head + outside + "=========\n" + triton + tail)) == 1
