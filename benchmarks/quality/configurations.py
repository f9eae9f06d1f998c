"""What is compared: CONFIGURATIONS, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .baselines import BASELINES


@dataclass(frozen=True)
class File:
    """A file of ours. rank: 0 is smoothing alone · calibrated: on the task's prompts for that · gptq."""

    rank: int
    calibrated: bool = True
    gptq: bool = False

    @property
    def name(self) -> str:
        return f"r{self.rank}" + ("-gptq" if self.gptq else "") + ("" if self.calibrated else "-free")


@dataclass(frozen=True)
class Configuration:
    """label, numbers: for tables; the latter are those of weights and activations · baseline: a key of BASELINES, or ·
    file: which is run by our loader in ``mode``: int4 and int8 are reference arithmetic, which runs everywhere, 16bit
    the loader's, int4-kernels and int8-kernels what a GPU computes. Neither: the 16-bit model."""

    label: str
    numbers: str
    baseline: str | None = None
    file: File | None = None
    mode: str = ""


_MODES = {
    "int4": ("int4, reference", "W4A4"),
    "int8": ("int8, reference", "W4A8"),
    "16bit": ("16bit", "W4A16"),
    "int4-kernels": ("int4, kernels", "W4A4"),
    "int8-kernels": ("int8, kernels", "W4A8"),
}


def _ours(file: File, mode: str = "int4") -> Configuration:
    what = "SmoothQuant alone" if not file.rank else f"SVDQuant rank {file.rank}"
    what += (", GPTQ" if file.gptq else "") + ("" if file.calibrated else ", not calibrated")
    shown, numbers = _MODES[mode]
    return Configuration(what if mode == "int4" else f"{what}, {shown}", numbers, file=file, mode=mode)


_R32, _GPTQ = File(32), File(32, gptq=True)
CONFIGURATIONS = {
    "16bit": Configuration("bf16", "W16A16"),
    **{name: Configuration(found.label, found.numbers, baseline=name) for name, found in BASELINES.items()},
    "smooth": _ours(File(0)),
    "r16": _ours(File(16)),
    "r32": _ours(_R32),
    "r64": _ours(File(64)),
    "r16-gptq": _ours(File(16, gptq=True)),
    "r32-gptq": _ours(_GPTQ),
    "r32-free": _ours(File(32, calibrated=False)),
    "r32-int8": _ours(_R32, "int8"),
    "r32-gptq-int8": _ours(_GPTQ, "int8"),
    "r32-16bit": _ours(_R32, "16bit"),
    "r32-int4-kernels": _ours(_R32, "int4-kernels"),
    "r32-int8-kernels": _ours(_R32, "int8-kernels"),
}


def choose(names: Sequence[str] | None, gpu: bool) -> dict[str, Configuration]:
    """Those of ``names``, or all that can run with or without a GPU, in the table's order."""
    return {
        name: found
        for name, found in CONFIGURATIONS.items()
        if (name in names if names is not None else gpu or not found.mode.endswith("kernels"))
    }
