"""Files <-> logical weights. ``open_checkpoint`` is the way in."""

from __future__ import annotations

import os

from .kitchen import build_kitchen, kitchen_prefix
from .legacy import open_legacy_folder
from .nunchaku import build_checkpoint
from .safetensors_file import Reader, mapped_reader, problem, read_header
from .saved import build_saved, saved_prefix
from .weights import AWQLinear, Checkpoint, CheckpointError, FluxConfig, Int8Linear, PlainLayer, W4A4Linear

__all__ = [
    "AWQLinear",
    "Checkpoint",
    "CheckpointError",
    "FluxConfig",
    "Int8Linear",
    "PlainLayer",
    "W4A4Linear",
    "open_checkpoint",
]


def open_checkpoint(path: str | os.PathLike[str], reader: Reader = mapped_reader) -> Checkpoint:
    """Open an SVDQuant INT4 FLUX checkpoint: a single safetensors file, a legacy folder, what ModelSave wrote, or a
    file in comfy-kitchen's layouts.

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
    header = read_header(path)
    if kitchen_prefix(header) is not None:  # first: both kinds have weight_zeros
        return build_kitchen(header, reader)
    if saved_prefix(header) is not None:
        return build_saved(header, reader)
    return build_checkpoint(path, "nunchaku", [header], header.metadata, reader)
