"""``convert``: an INT4 checkpoint in another format, or with LoRAs baked in."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..loaders import Checkpoint

FORMATS = {
    "nunchaku": "the svdq-int4 file that this pack and Nunchaku read",
    "comfy": "INT8 for ComfyUI's own Load Diffusion Model",
    "comfy-svdquant": "comfy-kitchen's 4-bit layouts",
}
_SAME = {"nunchaku": "nunchaku", "comfy-kitchen": "comfy-svdquant"}  # format of a checkpoint -> name here


@dataclass(frozen=True)
class Lora:
    """path · strength"""

    path: str
    strength: float


@dataclass(frozen=True)
class Result:
    """nbytes: of the file · to: its format · dense: layers that are in 16 bits because the format has no place for
    them · left_out: tensors of LoRAs that are for text encoders or, if that was asked for, for modulation layers."""

    nbytes: int
    to: str
    dense: tuple[str, ...]
    left_out: int


def lora(text: str) -> Lora:
    """FILE or FILE:STRENGTH, for argparse; a file whose name has such an end is taken as it is."""
    path, colon, number = text.rpartition(":")
    if not colon or os.path.exists(text):
        return Lora(text, 1.0)
    try:
        strength = float(number)
    except ValueError:
        return Lora(text, 1.0)
    if not math.isfinite(strength):
        raise argparse.ArgumentTypeError(f"{text!r}: the strength is not a finite number")
    return Lora(path, strength)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="SRC", help="SVDQuant INT4 checkpoint: a .safetensors file or a legacy folder")
    parser.add_argument("out", metavar="OUT", help="the .safetensors file to write")
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser.add_argument("--to", choices=FORMATS, help=f"{formats}. Default for folders and with --lora: nunchaku")
    parser.add_argument(
        "--lora", type=lora, action="append", default=[], metavar="FILE[:STRENGTH]", help="bake it in; may be repeated"
    )
    parser.add_argument(
        "--without-modulation", action="store_true",
        help="leave out what LoRAs do to modulation layers, for which 4-bit formats have no place",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    from .console import StatusLine

    started, status = time.monotonic(), StatusLine()
    result = convert(
        args.file, args.out, args.to, args.lora, args.without_modulation, args.force,
        progress=lambda done, total: status.update(f"{args.out}: {done / total:4.0%}"),
    )  # fmt: skip
    status.clear()
    print(f"{args.out}: {result.nbytes / 1e6:,.1f} MB ({result.to}) in {time.monotonic() - started:.1f} s")
    if result.dense:
        print(f"{len(result.dense)} layers are in 16 bits, having no other form there: {', '.join(result.dense)}")
    if result.left_out:
        print(f"{result.left_out} tensors of LoRAs are left out: for text encoders, or modulation layers if asked for")
    return 0


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str | None = None,
    loras: Sequence[Lora] = (),
    without_modulation: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Write the checkpoint ``path`` to ``out`` in the format ``to``, with ``loras`` baked in (see docs/convert.md).

    One layer at a time is in memory; ``out`` appears complete or not at all, with the same bytes each time. Raises
    CheckpointError if the checkpoint or a LoRA cannot be read, if there is nothing to convert, or if the format has no
    place for what a LoRA changes.
    """
    from ..loaders import open_checkpoint
    from ..loaders.safetensors_file import mapped_reader
    from ..loaders.write import check_not_read, safetensors_writer
    from ..quantizer.lora import read_loras
    from .convert_targets import Baked, make_target

    # A mapping for each tensor: when a layer is dropped, its part of the file leaves memory with it.
    checkpoint = open_checkpoint(path, lambda file: lambda key: mapped_reader(file)(key))
    check_not_read(out, [*checkpoint.files, *(lora.path for lora in loras)])
    to = _format(checkpoint, to, bool(loras))
    deltas, left_out = read_loras([(lora.path, lora.strength) for lora in loras], checkpoint.config)
    baked = Baked(checkpoint, deltas, without_modulation)
    target = make_target(to, baked, [(lora.path, lora.strength) for lora in loras])
    specs = target.specs()
    with safetensors_writer(out, specs, target.metadata(), force) as write:
        for done, name in enumerate(checkpoint.layer_names, start=1):
            for key, tensor in target.tensors(name).items():
                write(key, tensor)
            progress(done, len(checkpoint.layer_names))
    return Result(Path(out).stat().st_size, to, tuple(target.dense), left_out + baked.left_out)


def _format(checkpoint: Checkpoint, to: str | None, with_loras: bool) -> str:
    """What to write. Raises CheckpointError if that would be the same again."""
    from ..loaders.safetensors_file import problem

    if to is None and not with_loras and checkpoint.format != "nunchaku-legacy-folder":
        remedy = f"Add --to {' or '.join(FORMATS)}, or --lora FILE"
        raise problem(checkpoint.path, "format", "nothing to do", "a change", remedy)
    to = to or "nunchaku"
    if not with_loras and _SAME.get(checkpoint.format) == to:
        others = " or ".join(name for name in FORMATS if name != to)
        raise problem(checkpoint.path, "format", f"{to} already", "another one", f"Choose --to {others}")
    return to
