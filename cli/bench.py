"""``bench``: figures of the kernels. Today the static ones: machine code and a model, for GPUs that are not here."""

from __future__ import annotations

import argparse
import json
import sys

from . import UserError

_COLUMNS = ("gpu", "op", "m", "n", "k", "rank", "tile", "instructions_per_mma", "registers", "spill_bytes",
            "epilogue_instructions", "predicted_us", "predicted_tops", "limit")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench``."""
    parser.add_argument("what", choices=("kernels",), help="kernels: the INT4 GEMM with its epilogues")
    parser.add_argument("--static", action="store_true", help="from machine code; needs no GPU")
    parser.add_argument("--json", action="store_true", help="a JSON list of rows instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the rows; returns the exit code."""
    if not args.static:
        raise UserError("bench kernels measures nothing yet: add --static for figures from machine code")
    from ..benchmarks.kernels import static_rows
    from .console import StatusLine

    status = StatusLine(sys.stderr)
    rows = list(static_rows(status.update))
    status.clear()
    print(json.dumps(rows, indent=1) if args.json else _table(rows))
    return 0


def _table(rows: list[dict]) -> str:
    cells = [_COLUMNS, *([str(row[name]) for name in _COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
