"""``quantize``: an SVDQuant INT4 checkpoint from a 16-bit FLUX.1 model."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..loaders.weights import FluxConfig
    from ..quantizer.job import Result

DTYPES = ("bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
DEFAULT_RANK = 32
DEFAULT_ITERATIONS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="SRC", help="16-bit FLUX.1 model: a .safetensors file or a folder of them")
    parser.add_argument("out", metavar="OUT", help="the .safetensors file to write, 3.5 times smaller")
    parser.add_argument(
        "--no-calibration", action="store_true", help="use the weights alone; the only way yet, so needed"
    )
    parser.add_argument("--rank", type=int, default=DEFAULT_RANK, help="of the low-rank branch: 16 to 128, default 32")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of scales and 16-bit layers; default: bf16")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto (default): a GPU if there is one")
    parser.add_argument(
        "--iterations", type=int, default=DEFAULT_ITERATIONS, help="rounds per layer: 1 is fast, 8 (default) better"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    from . import UserError
    from .console import StatusLine

    if not args.no_calibration:
        raise UserError("calibrated quantization is not there yet; add --no-calibration to use the weights alone")
    started = time.monotonic()
    status = StatusLine()

    def progress(done: int, total: int, name: str) -> None:
        status.update(f"{args.out}: {done / total:4.0%}, {name}")

    result = quantize(
        args.file, args.out, args.rank, args.dtype, args.device, args.iterations, args.seed, args.force, progress
    )
    status.clear()
    if result.resumed:
        print(f"{args.out}: went on from {result.resumed} finished units")
    for folder in result.leftovers:
        print(f"{folder}: unfinished work with other settings, left alone; delete it if you do not need it")
    summary = result.report["summary"]["w4a4"]
    mean = {name: (summary[name] or {}).get("mean") for name in ("weight_sqnr_db", "output_sqnr_db")}
    print(
        f"{args.out}: {result.nbytes / 1e6:,.1f} MB in {time.monotonic() - started:.1f} s; 4-bit layers: "
        f"weights {mean['weight_sqnr_db']} dB, outputs for random activations {mean['output_sqnr_db']} dB"
    )
    return 0


def quantize(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    rank: int = DEFAULT_RANK,
    dtype: str = "bf16",
    device: str = "auto",
    iterations: int = DEFAULT_ITERATIONS,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Result:
    """Quantize the 16-bit model ``path`` to ``out`` from its weights alone; the arguments are the command's options.

    ``progress`` is called with (weights done, weights in all, what comes next). Raises CheckpointError for everything
    that the person can put right; see quantizer/job.py for what is kept then.
    """
    import torch

    from ..loaders.safetensors_file import problem
    from ..quantizer import job
    from ..quantizer.source import open_dense

    if device == "cuda" and not torch.cuda.is_available():
        raise problem(str(out), "device", "no CUDA GPU", "one that torch sees", "Use --device cpu, or see: doctor")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model = open_dense(path)
    settings = job.Settings(rank, dtype, iterations, seed)
    metadata = _metadata(os.path.basename(os.path.abspath(path)), model.config, rank)
    return job.quantize(model, out, settings, metadata, device, force, progress)


def _metadata(source: str, config: FluxConfig, rank: int) -> dict[str, str]:
    """The four strings of a merged file, with the source's name where the loader looks for the variant."""
    from . import synth

    metadata = synth.file_metadata("", config, rank)
    diffusers = json.loads(metadata["config"]) | {"_name_or_path": source}
    return metadata | {"config": json.dumps(diffusers, indent=2) + "\n", "svdq.source": source}
