"""What calibration knows of the inputs of a FLUX model's linears, and how it is collected: hooks on ComfyUI's modules.

Statistics of all inputs fit into memory (0.9 GB for FLUX.1) and are collected in one run of the calibration. Matrices
of second moments do not (56 GB), so they are collected for a few units at a time, in as many runs as that takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..loaders.safetensors_file import mapped_reader, problem, read_header
from ..loaders.weights import CheckpointError
from ..loaders.write import write_tensors

ROWS = 256  # of each input, kept to measure output errors on
_MOMENT_ROWS = 1024  # of each call, at most, that count for second moments
_WAITING = 64 * 2**20  # bytes of rows on the device until they are copied
_SEED = 0x5D0
_LEAST_IMPORTANCE = 0.01  # of a channel, relative to the mean: calibration has not seen everything

OnStep = Callable[[int, int], None]
"""Called with (evaluations of the model done, evaluations in all)."""
Run = Callable[[OnStep], None]


class Calibration(Protocol):
    """The 16-bit model at work.

    flux: the module whose linears have ComfyUI's stock names · device: on which it computes · moment_bytes: what
    matrices of second moments may take there at a time.
    """

    flux: nn.Module
    device: torch.device
    moment_bytes: int

    def describe(self) -> dict[str, Any]:
        """As JSON, what decides the activations beside the model."""

    def make_room(self, nbytes: int) -> None:
        """Take models out of the device's memory until that much is free."""

    def run(self, on_step: OnStep) -> None:
        """Evaluate the model on all prompts and timesteps; the same inputs in the same order each time."""


@dataclass(frozen=True)
class InputStatistics:
    """One input of K channels: amax, square: float32 [K], largest magnitude and mean square · rows: [at most ROWS, K],
    a random choice of tokens in the type in which the model computes."""

    amax: Tensor
    square: Tensor
    rows: Tensor

    @property
    def importance(self) -> Tensor | None:
        """float32 [K]: how much errors of a channel's weights count; None where no channel was ever active."""
        if not self.square.any():
            return None
        return self.square.clamp_min(_LEAST_IMPORTANCE * self.square.mean().item())

    def section(self, columns: slice) -> InputStatistics:
        return InputStatistics(self.amax[columns], self.square[columns], self.rows[:, columns])

    def to(self, device: torch.device, dtype: torch.dtype) -> InputStatistics:
        """dtype: of the rows; what is beyond its range becomes its largest value, as in the engine."""
        limit = torch.finfo(dtype).max
        rows = self.rows.to(device).clamp(-limit, limit).to(dtype)
        return InputStatistics(self.amax.to(device), self.square.to(device), rows)


@dataclass(frozen=True)
class Activations:
    """What is known when a unit is made. inputs: stock layer -> statistics · moments: (stock layer, first column of a
    section of its input) -> float32 [K, K], mean of x^T x; empty without GPTQ."""

    inputs: Mapping[str, InputStatistics]
    moments: Mapping[tuple[str, int], Tensor]


def collect(
    calibration: Calibration, names: list[str], on_step: OnStep, run: Run | None = None
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of the linears ``names``, in one run: of the calibration, or ``run``, which has it run.

    Raises CheckpointError if one is not finite or was never used.
    """
    transfer = _Transfer()
    recorders = {name: _Inputs(seed, transfer) for seed, name in enumerate(names, start=_SEED)}
    _watch(calibration, recorders, run or calibration.run, on_step)
    return {name: recorder.result(name) for name, recorder in recorders.items()}


def collect_moments(
    calibration: Calibration, sections: Mapping[str, list[slice]], on_step: OnStep, run: Run | None = None
) -> dict[tuple[str, int], Tensor]:
    """Second moments of sections of some linears' inputs, in one run: see :class:`Activations`. run: as for
    :func:`collect`."""
    calibration.make_room(moments_nbytes(sections))
    recorders = {name: _Moments(columns, calibration.device) for name, columns in sections.items()}
    _watch(calibration, recorders, run or calibration.run, on_step)
    return {(name, first): m for name, recorder in recorders.items() for first, m in recorder.result().items()}


def moments_nbytes(sections: Mapping[str, list[slice]]) -> int:
    return sum(4 * (columns.stop - columns.start) ** 2 for found in sections.values() for columns in found)


def save(path: Path, found: Mapping[str, InputStatistics]) -> None:
    tensors = {f"{name}.{leaf}": tensor for name, stats in found.items() for leaf, tensor in vars(stats).items()}
    write_tensors(path, tensors, {}, force=True)


def load(path: Path, names: list[str]) -> dict[str, InputStatistics] | None:
    """What :func:`save` wrote, as views of the file; None if it is not there or not that."""
    try:
        stored = read_header(str(path)).tensors
    except CheckpointError:
        return None
    leaves = InputStatistics.__dataclass_fields__
    if {f"{name}.{leaf}" for name in names for leaf in leaves} != set(stored):
        return None
    read = mapped_reader(str(path))
    return {name: InputStatistics(**{leaf: read(f"{name}.{leaf}") for leaf in leaves}) for name in names}


def _watch(
    calibration: Calibration, recorders: Mapping[str, Callable[[Tensor], None]], run: Run, on_step: OnStep
) -> None:
    with torch.inference_mode(), _watching(calibration.flux, recorders):
        run(on_step)


@contextlib.contextmanager
def _watching(flux: nn.Module, recorders: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Each linear's input goes to its recorder as [tokens, K] while the block runs."""
    with contextlib.ExitStack() as stack:
        for name, record in recorders.items():
            hook = flux.get_submodule(name).register_forward_pre_hook(partial(_pass_on, record))
            stack.callback(hook.remove)
        yield


def _pass_on(record: Callable[[Tensor], None], module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    x = arguments[0].detach()
    record(x.reshape(-1, x.shape[-1]))


class _Transfer:
    """Brings rows to the CPU, many at a time: each copy waits for the device, and the model's weights with it."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        self._nbytes = 0

    def put(self, rows: Tensor, take: Callable[[Tensor], None]) -> None:
        """Later, but in this order: take(rows on the CPU)."""
        self._waiting.append((rows, take))
        self._nbytes += rows.nbytes
        if self._nbytes > _WAITING:
            self.finish()

    def finish(self) -> None:
        for rows, take in self._waiting:
            take(rows.cpu())
        self._waiting.clear()
        self._nbytes = 0


class _Inputs:
    """Collects :class:`InputStatistics` over calls, where the inputs are; chosen rows go to the CPU by ``transfer``."""

    def __init__(self, seed: int, transfer: _Transfer | None = None) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._transfer = transfer or _Transfer()
        self._keys, self._arrived = torch.empty(0), torch.empty(0, dtype=torch.int64)  # of the rows; their tokens
        self._rows: Tensor | None = None  # [ROWS, K]
        self._amax = self._sum = torch.zeros(())
        self._tokens = 0

    def __call__(self, x: Tensor) -> None:
        amax, total = x.abs().amax(dim=0).float(), x.float().square().sum(dim=0)
        total = (total if total.device.type in ("cuda", "cpu") else total.cpu()).double()  # others may have no float64
        if self._rows is None:
            self._rows, self._amax, self._sum = torch.empty(ROWS, x.shape[1], dtype=x.dtype), amax, total
        else:
            self._amax, self._sum = torch.maximum(self._amax, amax), self._sum + total
        # Each token draws a number; those with the largest stay, whatever the order of the calls' sizes.
        before = len(self._keys)
        keys = torch.cat([self._keys, torch.rand(len(x), generator=self._generator)])
        kept = keys.topk(min(ROWS, len(keys))).indices
        chosen = kept[kept >= before]
        if len(chosen):
            free = torch.ones(len(kept), dtype=torch.bool)
            free[kept[kept < before]] = False
            places = free.nonzero()[:, 0]
            self._keys = torch.cat([self._keys, torch.empty(len(kept) - before)])
            self._arrived = torch.cat([self._arrived, torch.empty(len(kept) - before, dtype=torch.int64)])
            self._keys[places], self._arrived[places] = keys[chosen], self._tokens + chosen - before
            index = (chosen - before).to(x.device, non_blocking=True)
            self._transfer.put(x[index], partial(self._put, places))
        self._tokens += len(x)

    def _put(self, places: Tensor, rows: Tensor) -> None:
        # By NumPy: for copies of this size torch's threads take milliseconds, for all linears ten times as long as the
        # model. As bytes, because it does not know every type.
        self._rows.view(torch.uint8).numpy()[places.numpy()] = rows.view(torch.uint8).numpy()

    def result(self, name: str) -> InputStatistics:
        if self._rows is None:
            raise problem(name, "activations", "none", "a layer that is evaluated", "Remove patches that skip blocks")
        self._transfer.finish()
        square = (self._sum.cpu() / self._tokens).float()
        rows = self._rows[self._arrived.argsort()]
        # As normal tensors: those made in inference mode cannot be changed outside of it.
        found = InputStatistics(*(tensor.clone() for tensor in (self._amax.cpu(), square, rows)))
        bad = int((~(found.amax.isfinite() & found.square.isfinite())).sum())
        if bad:
            what = f"{bad} of {len(square)} channels NaN or infinite"
            remedy = "Does the 16-bit model make pictures with these prompts? If not, load it in bf16"
            raise problem(name, "activations", what, "finite ones", remedy)
        return found


class _Moments:
    """Collects x^T x of sections of an input; all memory is taken at once, before the model comes to the device."""

    def __init__(self, sections: list[slice], device: torch.device) -> None:
        self._sums = [(part, torch.zeros(2 * [part.stop - part.start], device=device)) for part in sections]
        self._tokens = 0

    def __call__(self, x: Tensor) -> None:
        x = x[:: -(-len(x) // _MOMENT_ROWS)]
        self._tokens += len(x)
        for columns, total in self._sums:
            part = x[:, columns].float()
            total.addmm_(part.t(), part)

    def result(self) -> dict[int, Tensor]:
        return {columns.start: total.div_(max(1, self._tokens)) for columns, total in self._sums}
