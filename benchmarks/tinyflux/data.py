"""Samples as tensors, made by processes side by side while something else happens."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ...loaders.demo_assets import byte_numbers
from .flow import pack_numbers
from .pictures import prompts
from .score import targets

_CHUNK = 4096


@dataclass(frozen=True)
class Batch:
    """rows: float32 [B, ROW] of `pictures.render` · numbers: uint8 [B, T, 5] of `flow.encode_prompts` · wanted: int8
    [B, heads] of `score.targets`."""

    rows: Tensor
    numbers: Tensor
    wanted: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def __getitem__(self, index: Tensor | slice) -> Batch:
        return Batch(*(getattr(self, field.name)[index] for field in fields(self)))


def make_batch(start: int, count: int, seed: int, held_out: bool) -> Batch:
    """Samples ``start`` to ``start + count`` of `pictures.prompts`."""
    samples = prompts(count, seed, held_out, start)
    return Batch(
        torch.tensor([sample.row for sample in samples], dtype=torch.float32),
        pack_numbers([byte_numbers(sample.prompt.encode()) for sample in samples]),
        torch.stack(list(targets(samples).values()), dim=1).to(torch.int8),
    )


class Samples:
    """Training samples of a seed. Workers begin at once; make it before CUDA is touched, which does not survive a fork.

    workers: processes; 0 makes them here, when asked for.
    """

    def __init__(self, count: int, seed: int, workers: int) -> None:
        self._jobs = [(start, min(_CHUNK, count - start), seed, False) for start in range(0, count, _CHUNK)]
        self._futures: list[Future[list[Tensor]]] = []
        if workers:
            context = multiprocessing.get_context("fork")
            pool = ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))
            self._futures = [pool.submit(_make_arrays, *job) for job in self._jobs]
            pool.shutdown(wait=False)

    def first(self, count: int) -> Batch:
        """The first samples, as soon as they are there: at least ``count``, or all."""
        chunks = range(min(-(-count // _CHUNK), len(self._jobs)))
        if self._futures:
            parts = [Batch(*map(torch.from_numpy, self._futures[index].result())) for index in chunks]
        else:
            parts = [make_batch(*self._jobs[index]) for index in chunks]
        return Batch(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Batch)))


def _make_arrays(*job: int) -> list:
    """As numpy arrays, which travel between processes as plain bytes."""
    batch = make_batch(*job)
    return [getattr(batch, field.name).numpy() for field in fields(batch)]
