"""``bench``: figures of the kernels, measured on this machine's GPU or, for others, from machine code and a model; and
of whole steps."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from . import ROOT, UserError, bench_flux, bench_memory, bench_quality
from .demo import write_atomically

_STATIC = ("gpu", "op", "m", "n", "k", "rank", "tile", "instructions_per_mma", "registers", "spill_bytes",
           "epilogue_instructions", "predicted_us", "predicted_tops", "limit")  # fmt: skip
_MEASURED = ("op", "linear", "m", "n", "k", "rank", "tile", "us", "low_us", "high_us", "value", "unit", "ceiling",
             "percent", "ceiling_of")  # fmt: skip
_OLDEST = (8, 0)  # compute capability: bf16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench``."""
    what = "kernels: INT4 GEMM with its epilogues, quantize, GEMV · flux: a step inside ComfyUI, beside other formats"
    what += " · memory: images on smaller cards, beside bf16 · quality: distance from the 16-bit model, by format"
    parser.add_argument("what", choices=("kernels", "flux", "memory", "quality"), help=what)
    parser.add_argument("--static", action="store_true", help="the GEMM on other GPUs, from machine code; needs no GPU")
    parser.add_argument("--json", action="store_true", help="a JSON list of rows instead of a table")
    parser.add_argument("--save", action="store_true", help="also write what was measured to benchmarks/results")
    bench_flux.add_arguments(parser)
    bench_memory.add_arguments(parser)
    bench_quality.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the rows; returns the exit code."""
    from .console import StatusLine

    if args.what != "quality" and importlib.util.find_spec("triton") is None:
        raise UserError(f"{sys.executable} lacks triton, which compiles the kernels; run: pip install triton")
    if args.static and args.save:
        raise UserError("--save is for measured rows; run without --static, or redirect --static --json")
    if args.what != "kernels" and args.static:
        raise UserError(f"--static is for kernels; bench {args.what} measures")
    status = StatusLine(sys.stderr)
    if args.what == "quality":
        return _quality(args, status)
    if args.what == "flux":
        found, columns = _flux(args, status), bench_flux.COLUMNS
    elif args.what == "memory":
        found, columns = _memory(args, status), bench_memory.COLUMNS
    elif args.static:
        found, columns = _static(status), _STATIC
    else:
        found, columns = _measured(status), _MEASURED
    rows: list[dict] = []
    try:
        for row in found:
            rows.append(row)
    finally:  # minutes of measuring are not lost to what comes last
        status.clear()
        if rows:
            print(json.dumps(rows, indent=1) if args.json else _table(rows, columns))
    if args.what == "kernels" and not args.static and not any(row["op"].startswith("gemm") for row in rows):
        print(f"no INT4 GEMM: there are no tiles for {rows[0]['arch']}", file=sys.stderr)
    if args.save:
        print(f"saved {_save(args.what, rows)}", file=sys.stderr)
    return 0


def _static(status) -> Iterator[dict]:
    from ..benchmarks.kernels import static_rows

    return static_rows(status.update)


def _flux(args: argparse.Namespace, status) -> Iterator[dict]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if gpu is None and args.model is None:
        raise UserError("there is no NVIDIA GPU here for a full-size model; name a small one with --model")
    return ({"gpu": gpu or "CPU", **row} for row in bench_flux.rows(args, status.update))


def _memory(args: argparse.Namespace, status) -> Iterator[dict]:
    import torch

    if not torch.cuda.is_available():
        raise UserError("there is no NVIDIA GPU here that could be made smaller")
    gpu = torch.cuda.get_device_name()
    return ({"gpu": gpu, **row} for row in bench_memory.rows(args, status.update))


def _quality(args: argparse.Namespace, status) -> int:
    found: dict = {}
    try:
        sheet = bench_quality.measure(args, found, status.update)
    finally:
        status.clear()
        if found:
            print(json.dumps(found, indent=1) if args.json else bench_quality.table(found))
    if args.save:
        saved = _write("quality", found["device"], found["date"], found)
        bench_quality.save_document(found, sheet)
        print(f"saved {saved} and {bench_quality.DOCUMENT}", file=sys.stderr)
    return 0


def _measured(status) -> Iterator[dict]:
    from ..kernels.device import describe

    device = describe("cuda")
    if device.capability is None:
        raise UserError("there is no NVIDIA GPU here to measure on; add --static for figures from machine code")
    if device.capability < _OLDEST:
        raise UserError(f"{device.name} is {device.architecture}, the kernels need sm_80; add --static for other GPUs")
    from ..benchmarks.kernels import measured_rows
    from ..benchmarks.measure import this_card

    return measured_rows(this_card(), status.update)


def _save(what: str, rows: list[dict]) -> Path:
    import torch

    today = datetime.date.today().isoformat()
    result = {"gpu": rows[0]["gpu"], "date": today, "torch": torch.__version__, "rows": rows}
    return _write(what, rows[0]["gpu"], today, result)


def _write(what: str, device: str, today: str, result: dict) -> Path:
    """Write what was measured to a file named after device and day; a second run of a day replaces the first."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = ROOT / "benchmarks" / "results" / f"{what}-{name}-{today}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1).encode())
    return path


def _table(rows: list[dict], columns: tuple[str, ...]) -> str:
    cells = [columns, *(["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)
