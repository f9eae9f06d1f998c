"""``quantize``: an SVDQuant INT4 checkpoint from a 16-bit FLUX.1 model."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import above_zero, positive, seed, size

if TYPE_CHECKING:
    from ..quantizer.job import Result
    from .console import StatusLine

DTYPES = ("bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
AUTO = "auto"
DEFAULT_RANK, MAX_RANK = 32, 128
DEFAULT_ITERATIONS = 8
DEFAULT_TARGET = 0.1
_LEAST_SHARE = 0.02  # done, before the speed says something
DEFAULT_SIZE = (1024, 1024)
DEFAULT_STEPS = 8
BUILTIN = "builtin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="SRC", help="16-bit FLUX.1 model: a .safetensors file or a folder of them")
    parser.add_argument("out", metavar="OUT", help="the .safetensors file to write, 3.5 times smaller")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--prompts", default=BUILTIN, metavar="FILE",
        help="calibrate on these prompts: a UTF-8 text, one per line; or builtin (default), 32 of our own",
    )  # fmt: skip
    how.add_argument("--conditioning", metavar="FILE", help="the same, encoded: a file of SVDQ Save Conditioning")
    how.add_argument("--no-calibration", action="store_true", help="use the weights alone: quick and worse")
    parser.add_argument("--gptq", action="store_true", help="let weights make up for each other's rounding: slower")
    parser.add_argument(
        "--size", type=size, default=DEFAULT_SIZE, metavar="WxH", help="of the calibration's pictures: 1024x1024"
    )
    parser.add_argument(
        "--steps", type=positive, default=DEFAULT_STEPS, help="per prompt: 8 (default); 4 suits schnell"
    )
    parser.add_argument("--text-encoders", type=Path, metavar="DIR", help="folder with t5xxl* and clip_l*")
    parser.add_argument(
        "--rank", type=_rank, default=DEFAULT_RANK, help="of the low-rank branch: 16 to 128, default 32; or auto"
    )
    parser.add_argument(
        "--target-error", type=above_zero, metavar="X",
        help="with --rank auto: of a layer's output, relative; default: 0.1",
    )  # fmt: skip
    parser.add_argument(
        "--keep-16bit", action="append", default=[], metavar="PATTERN",
        help="do not quantize these linears, by ComfyUI's names: double_blocks.0.* or *.txt_mlp.2; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--keep-int8", action="append", default=[], metavar="PATTERN",
        help="quantize these linears to eight bits instead of four, with 8-bit activations; may be repeated",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of scales and 16-bit layers; default: bf16")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto (default): a GPU if there is one")
    parser.add_argument(
        "--iterations", type=positive, default=DEFAULT_ITERATIONS,
        help="rounds per layer: 1 is fast, 8 (default) better",
    )  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="same seed, same bytes")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    from . import UserError
    from .console import StatusLine

    started, status = time.monotonic(), StatusLine()
    if args.rank == AUTO:
        args.rank, args.target_error = MAX_RANK, args.target_error or DEFAULT_TARGET
    elif args.target_error is not None:
        raise UserError("--target-error is for --rank auto")
    if args.no_calibration and args.gptq:
        raise UserError("--gptq looks at activations: leave --no-calibration out")
    if args.no_calibration:
        report = _without_calibration(args, status)
    else:
        from . import quantize_calibrated

        quantize_calibrated.run(quantize_calibrated.job_of(args), lambda text: status.update(f"{args.out}: {text}"))
        report = json.loads(Path(f"{args.out}.report.json").read_text(encoding="utf-8"))
    status.clear()
    print(_summary(args.out, report, time.monotonic() - started))
    return 0


class TimeLeft:
    """How far something is and how long the rest takes at the speed so far; starts anew where it falls back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[float, float] | None = None
        self._last = 0.0

    def text(self, done: float, total: float) -> str:
        now, share = self._clock(), done / total
        if self._first is None or share < self._last:
            self._first = now, share
        self._last = share
        started, before = self._first
        if share >= 1 or share - before < _LEAST_SHARE:
            return f"{share:4.0%}"
        left = (now - started) / (share - before) * (1 - share)
        return f"{share:4.0%}, {left / 60:.0f} min left" if left >= 90 else f"{share:4.0%}, {left:.0f} s left"


def _without_calibration(args: argparse.Namespace, status: StatusLine) -> dict[str, Any]:
    left = TimeLeft()

    def progress(done: int, total: int, name: str) -> None:
        status.update(f"{args.out}: {left.text(done, total)}, {name}")

    result = quantize(
        args.file, args.out, args.rank, args.dtype, args.device, args.iterations, args.seed, args.force, progress,
        args.target_error or 0.0, tuple(args.keep_16bit), tuple(args.keep_int8),
    )  # fmt: skip
    status.clear()
    if result.resumed:
        print(f"{args.out}: went on from {result.resumed} finished units")
    for folder in result.leftovers:
        print(f"{folder}: unfinished work with other settings, left alone; delete it if you do not need it")
    return result.report


def _summary(out: str, report: dict[str, Any], seconds: float) -> str:
    summary = report["summary"]["w4a4"]
    names = {
        "weight_sqnr_db": "weights",
        "calibration_sqnr_db": "outputs for the activations of the calibration",
        "output_sqnr_db": "outputs for random activations",
    }
    means = [f"{text} {summary[name]['mean']} dB" for name, text in names.items() if summary[name]]
    return f"{out}: {report['bytes'] / 1e6:,.1f} MB in {seconds:.1f} s; 4-bit layers: {', '.join(means)}"


def _rank(text: str) -> int | str:
    try:
        return AUTO if text == AUTO else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number and not {AUTO}") from error


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
    target_error: float = 0.0,
    keep_16bit: tuple[str, ...] = (),
    keep_int8: tuple[str, ...] = (),
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
    settings = job.Settings(
        rank, dtype, iterations, seed, target_error=target_error, keep_16bit=keep_16bit, keep_int8=keep_int8
    )
    metadata = job.file_metadata(os.path.basename(os.path.abspath(path)), model.config, rank)
    return job.quantize(model, out, settings, metadata, device, force, progress)
