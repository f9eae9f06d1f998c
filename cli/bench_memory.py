"""``bench memory``: images on a GPU that is made as small as cheaper cards, this pack beside bf16.

benchmarks/memory_caps.py measures; this starts it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

from ..benchmarks import memory_caps
from . import ROOT, UserError
from .bench_flux import installed_comfyui, script_rows

COLUMNS = ("gib", "mode", "label", "finished", "step_s", "times_ours", "first_s", "encode_s", "decode_s", "image_s",
           "first_image_s", "model_gib", "loaded_gib", "torch_gib", "card_gib", "copy_ms", "hidden_percent",
           "switches", "switch_s", "size_percent", "ram_growth_mb", "vram_growth_mb", "failed")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench memory``."""
    parser.add_argument("--folder", type=Path, help="memory: keep 36 GB of random models there (default: delete them)")
    memory_caps.add_options(parser)


def rows(args: argparse.Namespace, update: Callable[[str], None]) -> Iterator[dict]:
    """Rows as benchmarks/memory_caps.py describes them. Raises UserError."""
    for name, known in (("modes", memory_caps.OPTIONS), ("models", memory_caps.LABELS)):
        unknown = [value for value in getattr(args, name).split(",") if value not in known]
        if unknown:
            raise UserError(f"--{name} {unknown[0]} is not known; choose from {','.join(known)}")
    caps = args.caps.split(",")
    if not all(cap.replace(".", "", 1).isdecimal() and float(cap) > 0 for cap in caps):
        raise UserError(f"--caps {args.caps}: expected sizes of cards in GiB, as in 6,8,12")
    if args.steps < 2 or args.images < 1:
        raise UserError(f"--steps {args.steps} --images {args.images}: expected two steps and an image at least")
    if args.switches and (args.switches % 2 or args.switches < 10):
        raise UserError(f"--switches {args.switches}: expected an even number from 10 on, or 0 for none")
    comfyui = installed_comfyui()
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        update("writing models with random weights, 36 GB")
        command = [sys.executable, str(ROOT / "benchmarks" / "memory_caps.py"), str(comfyui), str(folder)]
        for name in ("caps", "modes", "models", "steps", "images", "switches", "timeout"):
            command += [f"--{name}", str(getattr(args, name))]
        for row in script_rows([*command, *(["--profile"] if args.profile else [])]):
            what = f"{row['gib']:g} GiB" if "gib" in row else "switches"
            update(f"{what}, {row['mode']}, {row['label']}: {row.get('step_s', row.get('switch_s', 'failed'))}")
            yield row
