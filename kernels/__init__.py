"""Choice of arithmetic: which precision a device gets, and why it does not get the others.

Tensors in, tensors out; nothing here knows files or ComfyUI. Nothing of Triton is imported when this package is, and
this is the only file that tries to: ``layers.py`` and what it uses need it.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from .device import INT4_CAPABILITIES, INT8_CAPABILITY, Device, describe

if TYPE_CHECKING:
    from .layers import Layers

PRECISIONS = ("auto", "int4", "int8", "16bit")
FORCE_VARIABLE = "SVDQ_BACKEND"


class BackendUnavailable(ValueError):
    """The precision that was asked for cannot run on this device; the message gives the reason and the alternatives."""

    # ComfyUI shows it with the class; the real one is the path of this pack's folder.
    __module__ = "svdq"


@dataclass(frozen=True)
class Backend:
    """precision: int4, int8 or 16bit · available: whether it can be chosen here · reason: one clause, why (not) ·
    kernels: whether Triton kernels compute it; PyTorch does otherwise."""

    precision: str
    available: bool
    reason: str
    kernels: bool = False

    @property
    def layers(self) -> Layers | ModuleType:
        """What computes whole layers for this backend: an object of ``layers.py``, or ``reference``."""
        if not self.kernels:
            return importlib.import_module(".reference", __name__)
        module = importlib.import_module(".layers", __name__)
        return module.INT4 if self.precision == "int4" else module.INT8


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
    has_int8 = device.kind == "cuda" and device.capability >= INT8_CAPABILITY
    problem = triton_problem() if has_int8 else None
    if has_int4:
        int4 = problem or f"{device.architecture} has INT4 tensor cores"
    elif device.capability is not None:
        int4 = f"{device.architecture} has no INT4 tensor cores"
    else:
        int4 = f"INT4 tensor cores exist on NVIDIA sm_80, sm_86 and sm_89 only, this device is {device.name}"
    if has_int8:
        int8 = problem or f"{device.architecture} has INT8 tensor cores"
    elif device.kind in ("cuda", "hip"):
        int8 = f"INT8 kernels are made for NVIDIA sm_80 and later, this device is {device.name}"
    else:
        int8 = f"INT8 kernels need a GPU, this device is {device.name}"
    return (
        _kernels("int4", has_int4 and problem is None, int4),
        _kernels("int8", has_int8 and problem is None, int8),
        Backend("16bit", True, "weights are dequantized to 16 bits on the fly, in PyTorch, on any device"),
    )


def _kernels(precision: str, available: bool, reason: str) -> Backend:
    return Backend(precision, available, reason, kernels=available)


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
    capable = device.kind == "cuda" and device.capability >= INT8_CAPABILITY
    kernels = value == "int4" and capable and triton_problem() is None
    arithmetic = "Triton kernels" if kernels else "PyTorch reference arithmetic"
    return Backend(value.removesuffix("-reference"), True, f"forced by {FORCE_VARIABLE}={value}, {arithmetic}", kernels)
