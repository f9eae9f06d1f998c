"""``doctor``: what this machine has, which backend the model would use, and one remedy per problem.

Facts are gathered first, each on its own, so that a broken driver or a missing torch hides nothing else. What follows
from them is pure functions of the facts. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from .environment import NEWEST_PYTHON, OLDEST_PYTHON, comfyui_of_user, comfyui_path

OLDEST_TORCH = (2, 8)
TRITON_RANGE = (3, 5), (3, 9)
OLDEST_COMFYUI = (0, 30)
COMFORTABLE_RAM = 16e9  # the model, 6.8 GB, and a T5 text encoder in 8 bits, 5 GB
COMFORTABLE_VRAM = 8e9
BF16_CAPABILITY = (8, 0)

LEVELS = ("error", "warning", "note")  # error: does not run · warning: runs badly · note: good to know


@dataclass(frozen=True)
class Gpu:
    """name · capability: (major, minor) or None · memory: bytes."""

    name: str
    capability: tuple[int, int] | None
    memory: int


@dataclass(frozen=True)
class Facts:
    """What this machine has; None where it is not there, and then ``*_missing`` says why.

    Versions are strings as their packages give them. smi: GPU name and driver version from nvidia-smi, None without it.
    torch_cuda, torch_hip: the toolkit that torch was built for; torch_architectures: the GPUs it has code for.
    gpus: the devices that torch can use; gpu_hidden: whether CUDA_VISIBLE_DEVICES hides them all.
    comfyui_own: whether it is the person's own, not that of ``.venv``.
    backends: (precision, available, reason), best first. forced: the environment variable SVDQ_BACKEND;
    forced_problem: why no backend can be chosen by it.
    """

    python: tuple[int, int, int]
    system: str
    machine: str
    ram: int | None = None
    smi: tuple[str, str] | None = None
    torch: str | None = None
    torch_missing: str = ""
    torch_cuda: str | None = None
    torch_hip: str | None = None
    torch_architectures: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    gpu_missing: str = ""
    gpu_hidden: bool = False
    triton: str | None = None
    triton_missing: str = ""
    safetensors: str | None = None
    comfyui: str | None = None
    comfyui_path: str | None = None
    comfyui_own: bool = False
    comfy_kitchen: str | None = None
    backends: tuple[tuple[str, bool, str], ...] = ()
    forced: str = ""
    forced_problem: str = ""


@dataclass(frozen=True)
class Finding:
    """level: one of LEVELS · what: the problem · remedy: the one thing to do about it."""

    level: str
    what: str
    remedy: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    facts = gather()
    problems = findings(facts)
    if args.json:
        everything = {"facts": asdict(facts), "backend": chosen(facts), "findings": [asdict(f) for f in problems]}
        print(json.dumps(everything, indent=2))
    else:
        print("\n".join(report(facts, problems)))
    return 1 if any(problem.level == "error" for problem in problems) else 0


# ---- conclusions


def chosen(facts: Facts) -> str | None:
    """The precision that "auto" takes here, or None without torch and where SVDQ_BACKEND names none."""
    if facts.forced_problem:
        return None
    return facts.forced or next((precision for precision, available, _ in facts.backends if available), None)


def findings(facts: Facts) -> list[Finding]:
    """Everything that is wrong or worth knowing, the worst first."""
    found = [*_python(facts), *_torch(facts), *_gpu(facts), *_triton(facts), *_comfyui(facts), *_memory(facts)]
    if facts.forced_problem:
        what, _, remedy = facts.forced_problem.rpartition(": ")
        found.append(Finding("error", what, remedy.capitalize()))
    elif facts.forced:
        what = f"SVDQ_BACKEND={facts.forced} overrides the choice of backend"
        found.append(Finding("note", what, "Unset it after testing"))
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _python(facts: Facts) -> list[Finding]:
    if OLDEST_PYTHON <= facts.python[:2] <= NEWEST_PYTHON:
        return []
    what = f"Python {_dotted(facts.python)}; {_dotted(OLDEST_PYTHON)} to {_dotted(NEWEST_PYTHON)} are supported"
    return [Finding("error", what, "Run this with python3.12, for example")]


def _torch(facts: Facts) -> list[Finding]:
    if facts.torch is None:
        what = f"torch cannot be imported: {facts.torch_missing}"
        remedy = "python3 . demo installs it into .venv"
        if facts.comfyui_own:
            remedy = f"Start this command with the Python that runs your ComfyUI ({facts.comfyui_path})"
        return [Finding("error", what, remedy)]
    found = []
    if _version(facts.torch) < OLDEST_TORCH:
        found.append(Finding("error", f"torch {facts.torch}; 2.8 or later is needed", "pip install --upgrade torch"))
    if facts.safetensors is None:
        found.append(Finding("error", "the safetensors package is missing", "pip install safetensors"))
    return found


def _gpu(facts: Facts) -> list[Finding]:
    if facts.torch is None:
        return []
    if facts.gpus:
        gpu = facts.gpus[0]
        if gpu.capability is None:
            return []
        if facts.torch_architectures and not _runs_on(gpu.capability, facts.torch_architectures):
            what = f"torch {facts.torch} has no code for {gpu.name} ({_architecture(gpu)})"
            return [Finding("error", what, "Install a torch for this GPU: https://pytorch.org/get-started/locally")]
        if gpu.capability < BF16_CAPABILITY:
            what = f"{gpu.name} ({_architecture(gpu)}) has no bf16 arithmetic: slow"
            return [Finding("warning", what, "A GPU from the RTX 30 series on is recommended")]
        return []
    if facts.smi is None:
        what = "no GPU that torch can use: the model runs on the CPU, which takes minutes per step at full size"
        return [Finding("warning", what, "Use a machine with an NVIDIA GPU; the demo and all tests run without one")]
    name, driver = facts.smi
    if facts.torch_cuda is None:
        what = f"{name} is there, but torch {facts.torch} is built without CUDA"
        remedy = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
        return [Finding("error", what, remedy)]
    if facts.gpu_hidden:
        return [Finding("warning", f"{name} is hidden by CUDA_VISIBLE_DEVICES", "Unset CUDA_VISIBLE_DEVICES")]
    what = f"torch for CUDA {facts.torch_cuda} cannot use {name} with driver {driver}: {facts.gpu_missing}"
    return [Finding("error", what, "Update the NVIDIA driver and restart")]


def _runs_on(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether a torch built for ``architectures`` ("sm_86", "compute_90", ...) has code for this GPU: binary code runs
    on the same major version from its minor version on, PTX ("compute") on anything newer."""
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
        if match:
            built = (int(match[2]), int(match[3]))
            if built <= capability and (match[1] == "compute" or built[0] == capability[0]):
                return True
    return False


def _triton(facts: Facts) -> list[Finding]:
    """Only where a kernel could use it; without it everything still runs, more slowly."""
    if not facts.gpus or facts.torch is None:
        return []
    package = "triton-windows" if facts.system == "Windows" else "triton"
    if facts.triton is None:
        what = f"Triton cannot be imported ({facts.triton_missing}): 4-bit layers run in 16 bits, several times slower"
        return [Finding("warning", what, f"pip install {package}")]
    no_compiler = next((reason for _, _, reason in facts.backends if "C compiler" in reason), None)
    if no_compiler is not None:
        what = f"{no_compiler}: 4-bit layers run in 16 bits, several times slower"
        return [Finding("warning", what, "Install gcc (Debian, Ubuntu: sudo apt install gcc)")]
    oldest, newest = TRITON_RANGE
    if not oldest <= _version(facts.triton) <= newest:
        what = f"Triton {facts.triton}; kernels are tested with {_dotted(oldest)} to {_dotted(newest)}"
        return [Finding("note", what, f"pip install '{package}>={_dotted(oldest)},<{newest[0]}.{newest[1] + 1}'")]
    return []


def _comfyui(facts: Facts) -> list[Finding]:
    if facts.comfyui_path is None:
        what = "no ComfyUI found in COMFYUI_PATH, around this pack or in .venv"
        return [Finding("warning", what, "Set COMFYUI_PATH to its folder, or let python3 . demo fetch one")]
    found = []
    if facts.comfyui is None:
        what = f"the ComfyUI in {facts.comfyui_path} does not say its version; 0.30 or later is needed"
        found.append(Finding("warning", what, "Update ComfyUI"))
    elif _version(facts.comfyui) < OLDEST_COMFYUI:
        what = f"ComfyUI {facts.comfyui} in {facts.comfyui_path}; 0.30 or later is needed"
        found.append(Finding("error", what, "Update ComfyUI"))
    if facts.comfy_kitchen is None and facts.torch is not None:
        remedy = f"pip install -r {Path(facts.comfyui_path) / 'requirements.txt'}"
        found.append(Finding("error", "the comfy-kitchen package, which ComfyUI requires, is missing", remedy))
    return found


def _memory(facts: Facts) -> list[Finding]:
    found = []
    if facts.ram is not None and facts.ram < COMFORTABLE_RAM:
        what = f"{_gigabytes(facts.ram)} of memory; FLUX and its text encoder take about {_gigabytes(COMFORTABLE_RAM)}"
        found.append(Finding("warning", what, "Use the fp8 T5 text encoder and close other programs"))
    if facts.gpus and facts.gpus[0].memory < COMFORTABLE_VRAM:
        what = f"{_gigabytes(facts.gpus[0].memory)} of GPU memory: the model will be moved in and out"
        found.append(Finding("note", what, "Start ComfyUI with --lowvram if it runs out of memory"))
    return found


def report(facts: Facts, problems: list[Finding]) -> list[str]:
    """The lines that a person reads."""
    torch = f"{facts.torch} ({_toolkit(facts)})" if facts.torch else f"missing: {facts.torch_missing}"
    comfyui = f"{facts.comfyui or 'unknown version'} in {facts.comfyui_path}" if facts.comfyui_path else "not found"
    rows = [
        ("system", f"{facts.system} {facts.machine}, Python {_dotted(facts.python)}, {_gigabytes(facts.ram)} memory"),
        *(("GPU", _gpu_line(gpu)) for gpu in facts.gpus),
        *([] if facts.gpus else [("GPU", f"{facts.smi[0]}, not usable by torch" if facts.smi else "none")]),
        ("driver", facts.smi[1] if facts.smi else "no nvidia-smi"),
        ("torch", torch),
        ("Triton", facts.triton or f"missing: {facts.triton_missing}"),
        ("ComfyUI", comfyui),
        ("comfy-kitchen", facts.comfy_kitchen or "missing"),
        ("safetensors", facts.safetensors or "missing"),
        ("backend", chosen(facts) or ("none" if facts.forced_problem else "unknown without torch")),
    ]
    for precision, available, reason in facts.backends:
        rows.append((f"  {'' if available else 'not '}{precision}", reason))
    lines = [f"{label:<14} {value}" for label, value in rows] + [""]
    if not problems:
        return [*lines, "No problems found."]
    for problem in problems:
        lines += [f"{problem.level}: {problem.what}", f"  -> {problem.remedy}"]
    return lines


def _toolkit(facts: Facts) -> str:
    if facts.torch_cuda:
        return f"CUDA {facts.torch_cuda}"
    return f"ROCm {facts.torch_hip}" if facts.torch_hip else "CPU only"


def _gpu_line(gpu: Gpu) -> str:
    return ", ".join(filter(None, (gpu.name, _architecture(gpu), _gigabytes(gpu.memory))))


def _architecture(gpu: Gpu) -> str:
    return "" if gpu.capability is None else f"sm_{gpu.capability[0]}{gpu.capability[1]}"


def _gigabytes(nbytes: float | None) -> str:
    return "unknown" if nbytes is None else f"{nbytes / 1e9:.0f} GB"


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _version(text: str) -> tuple[int, int]:
    """(major, minor) of a version string; (0, 0) if it has none."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


# ---- facts


def gather() -> Facts:
    """Ask this machine. Nothing that goes wrong on the way is raised."""
    facts: dict[str, object] = {
        "python": sys.version_info[:3],
        "system": platform.system(),
        "machine": platform.machine(),
        "forced": os.environ.get("SVDQ_BACKEND", ""),
        "gpu_hidden": os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"),
        "safetensors": _package("safetensors"),
        "comfy_kitchen": _package("comfy-kitchen"),
    }
    for ask in (_ask_ram, _ask_smi, _ask_torch, _ask_triton, _ask_comfyui, _ask_backends):
        answer, _ = _attempt(ask)
        facts |= answer or {}
    return Facts(**facts)


def _attempt(ask: Callable[[], dict[str, object]]) -> tuple[dict[str, object] | None, str]:
    """(answer, "") or (None, why not). A broken installation can raise anything, and the show must go on."""
    try:
        return ask(), ""
    except Exception as error:
        return None, _one_line(error)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _package(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _ask_ram() -> dict[str, object]:
    if hasattr(os, "sysconf"):
        return {"ram": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    import ctypes

    # MEMORYSTATUSEX: its length and load (32 bits each), then total physical memory and six more sizes.
    status = (ctypes.c_uint64 * 8)()
    status[0] = ctypes.sizeof(status)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return {"ram": int(status[1])}


def _ask_smi() -> dict[str, object]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    row = next(csv.reader(output.splitlines()))
    return {"smi": (row[0].strip(), row[1].strip())}


def _ask_torch() -> dict[str, object]:
    try:
        import torch
    except Exception as error:
        return {"torch_missing": _one_line(error)}
    facts: dict[str, object] = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
    }
    gpus, reason = _attempt(_ask_gpus)
    return facts | (gpus or {"gpu_missing": reason})


def _ask_gpus() -> dict[str, object]:
    import torch

    torch.cuda.init()  # unlike is_available it says why there is none
    gpus = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = None if torch.version.hip else (device.major, device.minor)
        gpus.append(Gpu(device.name, capability, device.total_memory))
    return {"gpus": tuple(gpus), "torch_architectures": tuple(torch.cuda.get_arch_list())}


def _ask_triton() -> dict[str, object]:
    try:
        import triton
    except Exception as error:
        return {"triton_missing": _one_line(error)}
    return {"triton": triton.__version__}


def _ask_comfyui() -> dict[str, object]:
    """The ComfyUI that the commands use."""
    folder = comfyui_path()
    if not (folder / "main.py").is_file():
        return {}
    text, _ = _attempt(lambda: {"text": (folder / "comfyui_version.py").read_text(encoding="utf-8")})
    match = re.search(r"""__version__\s*=\s*["']([^"']+)""", text["text"]) if text else None
    own = comfyui_of_user() is not None
    return {"comfyui_path": str(folder), "comfyui_own": own, "comfyui": match[1] if match else None}


def _ask_backends() -> dict[str, object]:
    import torch

    from .. import kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = ""
    try:
        kernels.backend_for(device)
    except kernels.BackendUnavailable as error:
        problem = str(error)
    backends = kernels.explain(device)
    explained = tuple((backend.precision, backend.available, backend.reason) for backend in backends)
    return {"backends": explained, "forced_problem": problem}
