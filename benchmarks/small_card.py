"""A GPU made as small as a cheaper card: the rest of its memory is taken before ComfyUI looks.

What is left is really all there is: allocations of torch and of ComfyUI's dynamic VRAM, which goes around torch's
allocator, fail where they would on the small card. Only the total has to be reported differently. Imports torch when it
is asked to report.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

DEVICE = 0


class SmallCard:
    """A card of ``gib`` GiB on CUDA device 0, for this process and as long as it lives.

    Like on the real card, the driver's share and this process's CUDA context (about 0.6 GiB on an H200) are part of it.
    Raises RuntimeError if there is no such GPU, or a smaller one.
    """

    def __init__(self, gib: float):
        self.total = int(gib * 2**30)
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), DEVICE)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)  # the one that torch will use
        free, total = self._memory()
        self._real_total = total
        taken = total - self.total
        if taken < 0:
            raise RuntimeError(f"a card of {gib:g} GiB does not fit a GPU of {total / 2**30:.1f} GiB")
        if taken > free:
            raise RuntimeError(f"other programs use {(total - free) / 2**30:.1f} GiB of the GPU, more than {gib:g} GiB")
        self._call("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(taken))

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._cuda, name)(*arguments)
        if error:
            raise RuntimeError(f"{name} failed with CUDA error {error}")

    def _memory(self) -> tuple[int, int]:
        """(free, total) bytes of the GPU; from any thread."""
        self._call("cuCtxSetCurrent", self._context)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def used(self) -> int:
        """Bytes of the small card that are in use, by whomever."""
        return self.total - self._memory()[0]

    def report(self) -> None:
        """Let torch report the small card's total. To be called before ComfyUI asks."""
        import torch

        memory, properties, total = torch.cuda.mem_get_info, torch.cuda.get_device_properties, self.total

        class Properties:
            total_memory = total

            def __init__(self, device: Any = None):
                self._real = properties(device)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._real, name)

        torch.cuda.mem_get_info = lambda device=None: (memory(device)[0], total)
        torch.cuda.get_device_properties = Properties


class Peak:
    """The most memory in use while the context is open, looked up ``hertz`` times a second in a thread: ``bytes``."""

    def __init__(self, card: SmallCard, hertz: float = 100):
        self.bytes = card.used()
        self._card, self._interval = card, 1 / hertz
        self._done, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self.bytes = max(self.bytes, self._card.used())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
