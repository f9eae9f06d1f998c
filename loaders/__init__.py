"""Files <-> logical weights. ``open_checkpoint`` is the way in."""

from __future__ import annotations

import os

from .legacy import open_legacy_folder
from .nunchaku import open_single_file
from .safetensors_file import Reader, mapped_reader, problem
from .weights import AWQLinear, Checkpoint, CheckpointError, FluxConfig, PlainLayer, W4A4Linear

__all__ = [
    "AWQLinear",
    "Checkpoint",
    "CheckpointError",
    "FluxConfig",
    "PlainLayer",
    "W4A4Linear",
    "open_checkpoint",
]


def open_checkpoint(path: str | os.PathLike[str], reader: Reader = mapped_reader) -> Checkpoint:
    """Open an SVDQuant INT4 FLUX checkpoint: a single safetensors file or a legacy folder.

    Headers are read and checked at once, tensor data only when a layer is asked for, as views of the mapped file.
    ``reader`` replaces the way in which tensors are read. Raises CheckpointError, one line that says what is wrong.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return open_legacy_folder(path, reader)
    if not os.path.exists(path):
        raise problem(path, "file", "nothing there", "a checkpoint file or folder", "Check the path")
    if not os.path.isfile(path):
        raise problem(path, "file", "neither file nor folder", "a checkpoint file or folder", "Check the path")
    return open_single_file(path, reader)
