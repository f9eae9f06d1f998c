"""``bench quality``: how near quantized FLUX is to the 16-bit model, ours beside other formats, on many prompts.

benchmarks/quality/run.py measures, in a process of its own for each model; this starts it, and writes docs/quality.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import ROOT, UserError
from .arguments import positive
from .bench_flux import installed_comfyui, script_rows
from .comfy_server import has_accelerator
from .demo import DEMO_WORKFLOW, write_atomically

PROMPTS, FEWEST = 256, 64
MODEL = ROOT / "assets" / "demo-flux-bf16.safetensors"
VAE = ROOT / "assets" / "demo-flux-vae.safetensors"
READER = ROOT / "assets" / "demo-flux-reader.safetensors"
DOCUMENT = ROOT / "docs" / "quality.md"
_CALIBRATION = 32  # prompts
_ITERATIONS = 8  # of the quantizer; what it does if not told otherwise
_PIXELS = 128
_BATCH = 256
# Below FEWEST prompts: whether everything works, on a CPU in a minute.
_QUICK = {"steps": 3, "calibration": 4, "iterations": 1}
# Of FLUX.1-dev's size: few prompts, because each has hundreds of tokens, and few rounds.
_FULL_SIZE = {"prompts": 8, "calibration": 8, "size": 256, "steps": 2, "iterations": 2, "batch": 8}
_FULL_SIZE_CPU = {  # half an hour; GPTQ alone would take longer
    "names": ["fp8", "int8", "nf4", "q4-0", "naive", "smooth", "r32", "r32-free", "r32-int8"],
    "prompts": 2, "calibration": 2, "size": 128, "steps": 2, "iterations": 1, "batch": 2,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench quality``."""
    parser.add_argument(
        "--prompts", type=positive, default=PROMPTS, help=f"quality: {PROMPTS} (default); below {FEWEST} a quick look"
    )
    parser.add_argument("--rows", metavar="A,B", help="quality: configurations by name (default: all that run here)")
    parser.add_argument("--full-size", action="store_true", help="quality: also layers of FLUX.1-dev's sizes")


def measure(args: argparse.Namespace, found: dict[str, Any], update: Callable[[str], None]) -> bytes:
    """The picture sheet, a JPEG. Puts into ``found`` what is measured, as it comes: date, device, ``pictures`` and, if
    asked for, ``full_size``, both as report.result gives them. Raises UserError, CheckpointError.
    """
    from ..benchmarks.quality.configurations import CONFIGURATIONS
    from ..quantizer.source import open_dense

    if args.save and (args.prompts < FEWEST or args.model or args.rows):
        raise UserError(f"--save writes docs/quality.md: all rows of the demo's model, {FEWEST} prompts or more")
    comfyui = installed_comfyui()
    files = {"model": MODEL, "vae": VAE, "reader": READER} if args.model is None else {"model": args.model}
    for path in files.values():
        if not path.is_file():
            remedy = "name a 16-bit FLUX model with --model" if args.model is None else "check the path"
            raise UserError(f"{path} does not exist; {remedy}")
    open_dense(files["model"])
    names = args.rows.split(",") if args.rows else None
    unknown = [name for name in names or () if name not in CONFIGURATIONS]
    if unknown:
        raise UserError(f"--rows {unknown[0]} is not known; choose from {','.join(CONFIGURATIONS)}")
    options = {
        "names": names,
        "prompts": args.prompts,
        "calibration": min(_CALIBRATION, args.prompts),
        "size": _PIXELS,
        "steps": _demo_steps(),
        "batch": _BATCH,
        "iterations": _ITERATIONS,
        **{name: str(files[name].absolute()) if name in files else None for name in ("model", "vae", "reader")},
        **(_QUICK if args.prompts < FEWEST else {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        pictures = _process(comfyui, Path(folder), options, update)
        sheet = (Path(folder) / "sheet.jpg").read_bytes()
    found |= {"date": datetime.date.today().isoformat(), "device": pictures["about"]["device"], "pictures": pictures}
    if args.full_size:
        options |= {"model": None, "vae": None, "reader": None} | _FULL_SIZE
        options |= {"names": names} if has_accelerator() else _FULL_SIZE_CPU
        with tempfile.TemporaryDirectory() as folder:
            found["full_size"] = _process(comfyui, Path(folder), options, update)
    return sheet


def _demo_steps() -> int:
    workflow = json.loads((ROOT / "workflows" / DEMO_WORKFLOW).read_text(encoding="utf-8"))
    # Seed, what happens to it, steps.
    return next(node["widgets_values"][2] for node in workflow["nodes"] if node["type"] == "SVDQFluxSampler")


def _process(comfyui: Path, folder: Path, options: dict[str, Any], update: Callable[[str], None]) -> dict[str, Any]:
    device = ("--disable-dynamic-vram",) if has_accelerator() else ("--cpu",)
    script = ROOT / "benchmarks" / "quality" / "run.py"
    command = [sys.executable, str(script), str(comfyui), str(folder), json.dumps(options), "--", *device]
    for row in script_rows(command):
        if "result" in row:
            return row["result"]
        update(row["status"])
    raise UserError("the measuring process ended without a result")


def table(found: dict[str, Any]) -> str:
    """For the console."""
    from ..benchmarks.quality import report

    return "\n\n".join(report.console(found[part]) for part in ("pictures", "full_size") if part in found)


def save_document(found: dict[str, Any], sheet: bytes) -> None:
    """Put the figures and the picture into docs/. Raises UserError if docs/quality.md has no place for them."""
    from ..benchmarks.quality import report

    text = DOCUMENT.read_text(encoding="utf-8")
    try:
        text = report.replaced(text, report.document(found))
    except ValueError as error:
        raise UserError(f"{DOCUMENT}: {error}") from error
    write_atomically(DOCUMENT, text.encode())
    write_atomically(DOCUMENT.with_name(report.PICTURE), sheet)
