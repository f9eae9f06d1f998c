"""Runs of a calibration that only start the blocks that are looked at.

Second moments take many runs on a small GPU (activations.py). What the model returned in the first run is known in all
later ones, and what the first block of a run reads was kept by the run before; so all other blocks can hand on what
they are given, and their weights stay where they are.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..loaders.safetensors_file import mapped_reader
from ..loaders.write import write_tensors
from .activations import OnStep, Run

_STREAMS = {"double_blocks": ("img", "txt"), "single_blocks": ("x",)}


class Replay:
    """A context. run: evaluates ``flux`` on the same inputs in the same order each time · folder: for what blocks read,
    28 MB for an evaluation of FLUX.1 at 1024 x 1024; removed at the start and at the end."""

    def __init__(self, flux: nn.Module, run: Run, folder: Path) -> None:
        self._flux, self._run, self._folder = flux, run, folder
        self._blocks = [(kind, i) for kind in _STREAMS for i in range(len(getattr(flux, kind)))]
        self._seen: list[tuple[float, Tensor]] = []  # of each evaluation: sum of x, output on the CPU
        self._complete = False
        self._kept: int | None = None  # the block whose inputs are in the folder

    def __enter__(self) -> Replay:
        self.__exit__()  # what a killed run left
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def all(self, on_step: OnStep) -> None:
        """A run with all blocks."""
        self._replay(None, None, on_step)

    def part(self, names: Iterable[str], following: Iterable[str], on_step: OnStep) -> None:
        """A run in which the linears ``names`` read what they read in a whole one. ``following``: those of the next
        part; both lie in blocks."""
        self._replay([self._index(name) for name in names], [self._index(name) for name in following], on_step)

    def _index(self, name: str) -> int:
        kind, number, _ = name.split(".", 2)
        return self._blocks.index((kind, int(number)))

    def _block(self, index: int) -> nn.Module:
        kind, number = self._blocks[index]
        return getattr(self._flux, kind)[number]

    def _replay(self, wanted: list[int] | None, following: list[int] | None, on_step: OnStep) -> None:
        start, stop = 0, len(self._blocks)
        after = min(following) if following else None
        if wanted and self._complete:
            start = min(wanted) if self._kept == min(wanted) else 0
            stop = max(max(wanted) + 1, after or 0)
        with contextlib.ExitStack() as stack:
            evaluation = stack.enter_context(self._known_outputs())
            for index in range(len(self._blocks)):
                if not start <= index < stop:
                    stack.enter_context(_handing_on(self._block(index), _STREAMS[self._blocks[index][0]]))
            # What a block reads is taken before it is replaced by what the next run's first block reads.
            if start:
                stack.enter_context(self._before(start, partial(self._give, evaluation)))
            if after is not None and after != self._kept:
                stack.enter_context(self._before(after, partial(self._keep, evaluation)))
                self._kept = None  # until all of it is there
            self._run(on_step)
        self._complete, self._kept = True, after

    @contextlib.contextmanager
    def _known_outputs(self) -> Iterator[Callable[[], int]]:
        """Gives a function that says which evaluation is under way."""
        real, number = self._flux.forward, -1
        if not self._complete:
            self._seen.clear()

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal number
            number += 1
            total, known = x.float().sum().item(), self._complete
            if known and (number >= len(self._seen) or self._seen[number][0] != total):
                raise RuntimeError(f"evaluation {number} of the model has other inputs than in the first run")
            out = real(x, *args, **kwargs)
            if not known:
                self._seen.append((total, out.cpu()))
                return out
            return self._seen[number][1].to(out.device, copy=True)

        self._flux.forward = forward
        try:
            yield lambda: number
        finally:
            del self._flux.forward

    @contextlib.contextmanager
    def _before(self, index: int, change: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]) -> Iterator[None]:
        """The block's streams go through ``change``."""
        names = _STREAMS[self._blocks[index][0]]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            # Streams come first in a block's signature: by position, however they were given.
            others = {name: value for name, value in kwargs.items() if name not in names}
            return (*change(_streams(names, args, kwargs)), *args[len(names) :]), others

        handle = self._block(index).register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _give(self, evaluation: Callable[[], int], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read = mapped_reader(str(self._file(evaluation())))
        return tuple(read(str(i)).to(old.device, copy=True) for i, old in enumerate(given))

    def _keep(self, evaluation: Callable[[], int], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._folder.mkdir(parents=True, exist_ok=True)
        streams = {str(i): tensor.cpu() for i, tensor in enumerate(given)}
        write_tensors(self._file(evaluation()), streams, {}, force=True)
        return given

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"


def _streams(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """What a block is called with: by position, by name or both."""
    return tuple(args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))


@contextlib.contextmanager
def _handing_on(block: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """The block returns what it is given."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = _streams(names, args, kwargs)
        return found if len(found) > 1 else found[0]

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
