"""What a process has in memory, and whether it becomes more. Imports torch when tensors are counted."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from pathlib import Path

STATUS = Path("/proc/self/status")  # Linux's


def ram() -> tuple[int, int]:
    """Bytes of this process in RAM: its own, and pages of mapped files. Raises OSError where there is no /proc."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    anonymous, file = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return anonymous, file


def tensors() -> int:
    """Tensors that Python knows, once garbage is collected."""
    import torch

    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def growth(values: Sequence[float], count: int) -> float:
    """From the first ``count`` values to the last, medians."""
    return round(statistics.median(values[-count:]) - statistics.median(values[:count]), 1)
