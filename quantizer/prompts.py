"""Prompts to calibrate on: the built-in list, texts, and files of encoded ones, which need no text encoders.

A file of encoded prompts is a safetensors file: ``0.context`` [T, C] and ``0.pooled`` [P] are what the text encoders
give for the first prompt, ``1.context`` and so on for the others, each in bf16, fp16 or float32. The metadata
``svdq.conditioning`` is JSON: ``{"version": 1, "guidance": [3.5, null, ...]}``, one number or null (the default) for
each prompt.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..loaders.safetensors_file import mapped_reader, problem, read_header
from ..loaders.write import Spec, safetensors_writer

METADATA = "svdq.conditioning"
BUILTIN_PROMPTS = Path(__file__).with_name("prompts.txt")
_EXPECTED = "a file of encoded prompts"
_REMEDY = "Make one with the node SVDQ Save Conditioning"
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Prompt:
    """context: [T, C] · pooled: [P] · guidance: of a distilled model, None for the default."""

    context: Tensor
    pooled: Tensor
    guidance: float | None = None


def write_prompts(path: str | os.PathLike[str], prompts: Sequence[Prompt], force: bool = False) -> None:
    """Write a file; it appears complete or not at all. Raises CheckpointError if it cannot be written."""
    tensors = {}
    for index, prompt in enumerate(prompts):
        tensors |= {f"{index}.context": _plain(prompt.context), f"{index}.pooled": _plain(prompt.pooled)}
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    metadata = {METADATA: json.dumps({"version": 1, "guidance": [prompt.guidance for prompt in prompts]})}
    with safetensors_writer(path, specs, metadata, force) as write:
        for name, tensor in tensors.items():
            write(name, tensor)


def _plain(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.bfloat16, torch.float16, torch.float32) else tensor.float()


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """All prompts of a file, checked. Raises CheckpointError."""
    path = os.fspath(path)
    header = read_header(path)
    if METADATA not in header.metadata:
        raise problem(path, "metadata", f"no {METADATA}", _EXPECTED, _REMEDY)
    try:
        described = json.loads(header.metadata[METADATA])
        version, guidance = described["version"], described["guidance"]
        numbers = all(g is None or (type(g) in (int, float) and math.isfinite(g)) for g in guidance)
        if version != 1 or not isinstance(guidance, list) or not numbers:
            raise ValueError(f"version {version}, guidance {guidance}")
    except (ValueError, KeyError, TypeError) as error:
        found = f"{header.metadata[METADATA]} ({error})"
        raise problem(path, METADATA, found, '{"version": 1, "guidance": [...]}', _REMEDY) from error
    if not guidance:
        raise problem(path, "prompts", "none", "at least one", _REMEDY)
    read = mapped_reader(path)
    prompts = []
    for index, value in enumerate(guidance):
        found = []
        for leaf, dimensions in (("context", 2), ("pooled", 1)):
            name = f"{index}.{leaf}"
            info = header.tensors.get(name)
            if info is None:
                raise problem(path, name, "no such key", f"the tensors of {len(guidance)} prompts", _REMEDY)
            if info.dtype not in _FLOATS or len(info.shape) != dimensions or 0 in info.shape:
                shape = "[tokens, channels]" if dimensions == 2 else "[channels]"
                raise problem(path, name, f"{info.dtype} {list(info.shape)}", f"floats {shape}", _REMEDY)
            tensor = read(name).clone()
            if not tensor.isfinite().all():
                raise problem(path, name, "values NaN or infinite", "finite ones", _REMEDY)
            found.append(tensor)
        prompts.append(Prompt(*found, value))
    return prompts


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The prompts of a text file, one per line; empty lines do not count. Raises CheckpointError."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at position {error.start}"
        raise problem(str(path), "text", found, "UTF-8", "Save the file as UTF-8") from error
    except OSError as error:
        found = error.strerror or str(error)
        raise problem(str(path), "file", found, "a text file", "Check the path and its permissions") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise problem(str(path), "prompts", "none", "one per line", "Write some prompts into it")
    return lines
