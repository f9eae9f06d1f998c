"""Choice of arithmetic: which precision a device gets, and why it does not get the others.

Tensors in, tensors out; nothing here knows files or ComfyUI. The Triton modules beside this file are not chosen yet,
and nothing of Triton is imported when this package is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .device import INT4_CAPABILITIES, Device, describe

PRECISIONS = ("auto", "int4", "int8", "16bit")
FORCE_VARIABLE = "SVDQ_BACKEND"


class BackendUnavailable(ValueError):
    """The precision that was asked for cannot run on this device; the message gives the reason and the alternatives."""


@dataclass(frozen=True)
class Backend:
    """precision: int4, int8 or 16bit · available: whether it can be chosen here · reason: one clause, why (not)."""

    precision: str
    available: bool
    reason: str


def explain(device: Device | torch.device | str) -> tuple[Backend, ...]:
    """Every precision with the reason why it can or cannot run on ``device``, best first."""
    if not isinstance(device, Device):
        device = describe(device)
    if device.kind == "cuda" and device.capability in INT4_CAPABILITIES:
        int4 = f"{device.architecture} has INT4 tensor cores, but this version does not use its INT4 kernels yet"
    elif device.capability is not None:
        int4 = f"{device.architecture} has no INT4 tensor cores"
    else:
        int4 = f"INT4 tensor cores exist on NVIDIA sm_80, sm_86 and sm_89 only, this device is {device.name}"
    if device.kind in ("cuda", "hip"):
        int8 = "this version has no INT8 kernels yet"
    else:
        int8 = f"INT8 kernels need a GPU, this device is {device.name}"
    return (
        Backend("int4", False, int4),
        Backend("int8", False, int8),
        Backend("16bit", True, "weights are dequantized to 16 bits on the fly, in PyTorch, on any device"),
    )


def backend_for(device: Device | torch.device | str, precision: str = "auto") -> Backend:
    """The backend that runs ``precision`` (one of PRECISIONS) on ``device``.

    The environment variable SVDQ_BACKEND=int4 forces INT4 arithmetic where no INT4 kernel runs, through the slow
    PyTorch reference: for tests and comparisons. Raises BackendUnavailable with the reason and the alternatives.
    """
    if precision not in PRECISIONS:
        raise BackendUnavailable(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    forced = os.environ.get(FORCE_VARIABLE, "")
    if forced:
        if forced not in ("int4", "16bit"):
            raise BackendUnavailable(f"{FORCE_VARIABLE} is {forced!r}, expected int4 or 16bit: change or unset it")
        return Backend(forced, True, f"forced by {FORCE_VARIABLE}={forced}, PyTorch reference arithmetic")
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
