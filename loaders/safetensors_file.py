"""Safetensors files, checked before anything is read from them.

The header is parsed here rather than by the safetensors library because its errors name neither file nor key, and
because a file can then be examined without mapping it. Tensors come from the library. Nothing here unpickles.
Format: https://github.com/huggingface/safetensors (8-byte little-endian header size, JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from .weights import CheckpointError

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the safetensors library's own limit
_MAX_SHOWN = 400
_FOREIGN = {
    b"PK\x03\x04": "a PyTorch pickle or zip archive",
    b"\x80\x02": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"GGUF": "a GGUF file",
    b"<!DO": "a web page (the download went wrong)",
    b"<htm": "a web page (the download went wrong)",
    b"vers": "a Git LFS pointer (the file itself was not downloaded)",
}
_REDOWNLOAD = "Download the file again and compare its size with the download page"

Reader = Callable[[str], Callable[[str], Tensor]]
"""Maps a path to a function from tensor name to tensor."""


@dataclass(frozen=True)
class TensorInfo:
    """dtype: safetensors' name ("BF16") · shape · nbytes · start: position of the first byte behind the header."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int


@dataclass(frozen=True)
class Header:
    """path · tensors: name -> TensorInfo · metadata: the header's ``__metadata__`` strings · file_bytes · data_start:
    position of the first byte behind the header."""

    path: str
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_bytes: int
    data_start: int


def problem(path: str, key: str, found: object, expected: object, remedy: str) -> CheckpointError:
    """A CheckpointError in the one form that all of them have."""
    key, found, expected = (printable(str(text)) for text in (key, found, expected))
    return CheckpointError(f"{printable(path)}: {key}: found {found}, expected {expected}. {remedy}.", found)


def printable(text: str) -> str:
    """``text`` on one line of reasonable length: names and values are the choice of whoever wrote the file."""
    shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


def mapped_reader(path: str) -> Callable[[str], Tensor]:
    """The default Reader: tensors are views of the memory-mapped file."""
    from safetensors import safe_open

    return safe_open(path, framework="pt").get_tensor


def read_header(path: str) -> Header:
    """Parse and check the header of a safetensors file; raises CheckpointError with what is wrong."""
    try:
        file_bytes = os.path.getsize(path)
        with open(path, "rb") as file:
            prefix, brace = file.read(8), file.read(1)
            foreign = next((what for magic, what in _FOREIGN.items() if prefix.startswith(magic)), None)
            # The size of a header may look like one of these: 1152 bytes like a pickle.
            if foreign is not None and not (prefix.endswith(bytes(4)) and brace == b"{"):
                raise problem(path, "first bytes", foreign, "a safetensors file", "Choose the .safetensors file")
            if len(prefix) < 8:
                raise problem(path, "file size", f"{file_bytes} bytes", "at least a safetensors header", _REDOWNLOAD)
            size = struct.unpack("<Q", prefix)[0]
            if size > _MAX_HEADER or size < 2:
                raise problem(
                    path, "header size", f"{size} bytes", f"2 to {_MAX_HEADER} bytes",
                    "This is not a safetensors file; choose the .safetensors file",
                )  # fmt: skip
            if 8 + size > file_bytes:
                raise problem(path, "header", f"a file of {file_bytes} bytes", f"a header of {size} bytes", _REDOWNLOAD)
            raw = brace + file.read(size - 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    return _parse(path, raw, file_bytes, data_bytes=file_bytes - 8 - size)


def read_bytes(header: Header, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of some small tensors, in that order; raises CheckpointError."""
    try:
        with open(header.path, "rb") as file:
            for name in names:
                info = header.tensors[name]
                file.seek(header.data_start + info.start)
                yield name, file.read(info.nbytes)
    except OSError as error:
        raise _unreadable(header.path, error) from error


def _unreadable(path: str, error: OSError) -> CheckpointError:
    return problem(path, "file", error.strerror or error, "a readable file", "Check the path and its permissions")


def _parse(path: str, raw: bytes, file_bytes: int, data_bytes: int) -> Header:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise problem(path, "header", f"invalid JSON ({error})", "a JSON object", _REDOWNLOAD) from error
    if not isinstance(header, dict):
        raise problem(path, "header", type(header).__name__, "a JSON object", _REDOWNLOAD)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise problem(path, "__metadata__", "other values", "strings only", "Write the file again with safetensors")
    spans, tensors = [], {}
    for name, entry in header.items():
        tensors[name], span = _tensor_entry(path, name, entry)
        spans.append((span, name))
    position = 0
    for (start, end), name in sorted(spans):
        if start != position:
            raise problem(path, name, f"data at byte {start}", f"data at byte {position}", _REDOWNLOAD)
        position = end
        if end > data_bytes:
            raise problem(
                path, name, f"a file that ends after {data_bytes} bytes of data",
                f"at least {end} bytes of data: the file is truncated", _REDOWNLOAD,
            )  # fmt: skip
    if position != data_bytes:
        raise problem(path, "data", f"{data_bytes} bytes", f"{position} bytes, as the header says", _REDOWNLOAD)
    return Header(path, tensors, metadata, file_bytes, file_bytes - data_bytes)


def _unique(path: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise problem(path, twice, "the key twice", "every key once", "Write the file again with safetensors")
    return result


def _tensor_entry(path: str, name: str, entry: object) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers_fit = all(type(v) is int and v >= 0 for v in (*shape, start, end))
        if not isinstance(dtype, str) or not numbers_fit:
            raise TypeError
    except (KeyError, TypeError, ValueError) as error:
        raise problem(
            path, name, repr(entry)[:80], "an entry with dtype, shape and data_offsets", _REDOWNLOAD
        ) from error
    if dtype not in _BITS:
        remedy = "This version does not know that type"
        raise problem(path, name, f"dtype {dtype}", f"one of {', '.join(_BITS)}", remedy)
    nbytes = math.prod(shape) * _BITS[dtype] // 8
    if end - start != nbytes:
        raise problem(path, name, f"{end - start} bytes", f"{nbytes} bytes for {dtype} {list(shape)}", _REDOWNLOAD)
    return TensorInfo(dtype, shape, nbytes, start), (start, end)
