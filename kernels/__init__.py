"""Choice of arithmetic: which precision a device gets, and why it does not get the others.

Tensors in, tensors out; nothing here knows files or ComfyUI. Nothing of Triton is imported when this package is, and
this is the only file that tries to: ``linear.py`` and what it uses need it.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from dataclasses import dataclass
from types import ModuleType

import torch

from .device import INT4_CAPABILITIES, Device, describe

PRECISIONS = ("auto", "int4", "int8", "16bit")
FORCE_VARIABLE = "SVDQ_BACKEND"


class BackendUnavailable(ValueError):
    """The precision that was asked for cannot run on this device; the message gives the reason and the alternatives."""


@dataclass(frozen=True)
class Backend:
    """precision: int4, int8 or 16bit · available: whether it can be chosen here · reason: one clause, why (not) ·
    kernels: whether Triton kernels compute it; PyTorch does otherwise."""

    precision: str
    available: bool
    reason: str
    kernels: bool = False

    def load(self) -> ModuleType:
        """The module that computes layers for this backend: ``linear`` or ``reference``."""
        return importlib.import_module(".linear" if self.kernels else ".reference", __name__)


@functools.cache
def triton_problem() -> str | None:
    """Why Triton's kernels cannot be compiled here, one clause, or None. Imports Triton."""
    try:
        version = importlib.import_module("triton").__version__
    except ImportError:
        return "Triton is not installed (pip install triton; on Windows triton-windows)"
    try:
        importlib.import_module(".gluon_compat", __name__)
    except (ImportError, AttributeError) as error:
        return f"Triton {version} does not have what the kernels need, expected 3.5 to 3.9 ({error})"
    if os.name != "nt" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to start kernels (install gcc, or name one in the variable CC)"
    return None


def explain(device: Device | torch.device | str) -> tuple[Backend, ...]:
    """Every precision with the reason why it can or cannot run on ``device``, best first."""
    if not isinstance(device, Device):
        device = describe(device)
    has_int4 = device.kind == "cuda" and device.capability in INT4_CAPABILITIES
    problem = triton_problem() if has_int4 else None
    if has_int4:
        int4 = problem or f"{device.architecture} has INT4 tensor cores"
    elif device.capability is not None:
        int4 = f"{device.architecture} has no INT4 tensor cores"
    else:
        int4 = f"INT4 tensor cores exist on NVIDIA sm_80, sm_86 and sm_89 only, this device is {device.name}"
    if device.kind in ("cuda", "hip"):
        int8 = "this version has no INT8 kernels yet"
    else:
        int8 = f"INT8 kernels need a GPU, this device is {device.name}"
    available = has_int4 and problem is None
    return (
        Backend("int4", available, int4, kernels=available),
        Backend("int8", False, int8),
        Backend("16bit", True, "weights are dequantized to 16 bits on the fly, in PyTorch, on any device"),
    )


def backend_for(device: Device | torch.device | str, precision: str = "auto") -> Backend:
    """The backend that runs ``precision`` (one of PRECISIONS) on ``device``.

    The environment variable SVDQ_BACKEND overrides both, for tests and comparisons: int4 takes the INT4 kernels on any
    NVIDIA GPU from sm_80 on (emulated and slow where it has no INT4 tensor cores) and PyTorch elsewhere, int4-reference
    takes PyTorch everywhere, 16bit dequantizes. Raises BackendUnavailable with the reason and the alternatives.
    """
    if precision not in PRECISIONS:
        raise BackendUnavailable(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    forced = os.environ.get(FORCE_VARIABLE, "")
    if forced:
        return _forced(device if isinstance(device, Device) else describe(device), forced)
    choices = explain(device)
    if precision == "auto":
        return next(choice for choice in choices if choice.available)
    chosen = next(choice for choice in choices if choice.precision == precision)
    if not chosen.available:
        others = ", ".join(c.precision for c in choices if c.available)
        raise BackendUnavailable(
            f"precision {precision} cannot run here: {chosen.reason}. Choose auto or one of: {others}"
        )
    return chosen


def _forced(device: Device, value: str) -> Backend:
    if value not in ("int4", "int4-reference", "16bit"):
        raise BackendUnavailable(
            f"{FORCE_VARIABLE} is {value!r}, expected int4, int4-reference or 16bit: change or unset it"
        )
    kernels = value == "int4" and device.kind == "cuda" and device.capability >= (8, 0) and triton_problem() is None
    arithmetic = "Triton kernels" if kernels else "PyTorch reference arithmetic"
    return Backend(value.removesuffix("-reference"), True, f"forced by {FORCE_VARIABLE}={value}, {arithmetic}", kernels)
