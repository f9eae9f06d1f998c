"""Writing safetensors files tensor by tensor: the file appears complete or not at all, and never holds up in memory."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .safetensors_file import problem

WriteTensor = Callable[[str, Tensor], None]
"""Writes one of the announced tensors; any order, any thread, each name once."""

_NAMES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8", torch.int32: "I32",
    torch.uint8: "U8",
}  # fmt: skip
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


@dataclass(frozen=True)
class Spec:
    """dtype and shape of a tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def safetensors_writer(
    path: str | os.PathLike[str], specs: Mapping[str, Spec], metadata: Mapping[str, str], force: bool = False
) -> Iterator[WriteTensor]:
    """A context in which the tensors of ``specs`` are written to ``path``, one at a time.

    The data goes to a temporary file in the same folder, which takes its name at the end; after an error or an
    interrupt nothing is left behind. Raises CheckpointError if the file exists and ``force`` is not set, if the folder
    is missing or the disk too full; ValueError if a tensor does not fit its Spec or is missing at the end.
    """
    path = Path(path)
    header, offsets = _header(specs, metadata)
    total = len(header) + sum(spec.nbytes for spec in specs.values())
    check_target(path, total, force)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    left = dict.fromkeys(specs)
    lock = threading.Lock()

    with _removed_unless_renamed(unfinished), open(unfinished, "wb") as file:
        file.write(header)
        file.truncate(total)

        def write(name: str, tensor: Tensor) -> None:
            spec = specs[name]
            if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, announced as {spec}")
            data = tensor.detach().cpu().contiguous()
            with lock:
                if name not in left:
                    raise ValueError(f"{name} was written twice")
                del left[name]
                if spec.nbytes:
                    file.seek(len(header) + offsets[name])
                    # A view of the tensor's memory: neither torch nor the standard library has one for bfloat16.
                    file.write((ctypes.c_char * spec.nbytes).from_address(data.data_ptr()))

        yield write
        if left:
            raise ValueError(f"{len(left)} tensors were not written, {next(iter(left))} among them")
        file.close()
        os.replace(unfinished, path)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], force: bool = False
) -> None:
    """Write tensors that are in memory; otherwise as :func:`safetensors_writer`."""
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with safetensors_writer(path, specs, metadata, force) as write:
        for name, tensor in tensors.items():
            write(name, tensor)


def check_target(path: Path, nbytes: int, force: bool) -> None:
    """Raise CheckpointError if ``nbytes`` cannot be written to ``path``: see :func:`safetensors_writer`."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise problem(str(path), "folder", f"no folder {folder}", "an existing folder", "Create it first")
    if path.is_dir():
        raise problem(str(path), "file", "a folder of that name", "a file name", "Choose another name")
    if path.exists() and not path.is_file():
        raise problem(str(path), "file", "a device, pipe or socket", "a file name", "Choose another name")
    if path.exists() and not force:
        raise problem(str(path), "file", "one that exists", "a new file", "Choose another name or add --force")
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise problem(
            str(path), "free disk space", _amount(free), _amount(nbytes),
            "Make room or write to another disk",
        )  # fmt: skip


def _amount(nbytes: int) -> str:
    """In the unit that shows it."""
    unit, size = next(((unit, size) for unit, size in _UNITS if nbytes >= size), _UNITS[-1])
    return f"{nbytes / size:.1f} {unit}"


def check_not_read(path: str | os.PathLike[str], files: Iterable[str | os.PathLike[str]]) -> None:
    """Raise CheckpointError if ``path``, which is to be written, is one of the ``files`` that are read."""
    if any(os.path.exists(path) and os.path.exists(file) and os.path.samefile(path, file) for file in files):
        raise problem(os.fspath(path), "file", "a file that is read", "another file", "Choose another name")


@contextlib.contextmanager
def _removed_unless_renamed(unfinished: Path) -> Iterator[None]:
    try:
        yield
    finally:
        unfinished.unlink(missing_ok=True)


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Size field and header of a safetensors file, and the offset of each tensor in the data behind it.

    Tensors with wide elements come first and then in order of name, as the safetensors library has them: so each is
    aligned to its element size.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    position = 0
    for name in sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name)):
        spec = specs[name]
        end = position + spec.nbytes
        entries[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
        offsets[name] = position
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets
