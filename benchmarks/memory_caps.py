"""FLUX.1-dev on cards of 6 to 16 GiB, ours and bf16 offloaded by ComfyUI: what ``python3 . bench memory`` runs.

    python benchmarks/memory_caps.py COMFYUI FOLDER [--caps 6,8,12,16] [--modes dynamic,static] [--models ours,bf16]

Makes a bigger GPU as small as each card (small_card.py) and, in one ComfyUI process for each card, memory mode and
model, makes pictures as a user does: text encoders in fp8, a few steps, VAE, at full size with random weights
(full_size_files.py), so that the models push each other out of memory. FOLDER takes 36 GB and is used again next time.

Prints one line "ROW {json}" for each: finished · first_image_s (files read, kernels compiled) · image_s (another prompt
on the same models: encode_s, first_s, steps of step_s, decode_s) · first_s (until the end of the first step) · step_s
(median of the others) · model_gib, loaded_gib (as ComfyUI counts: all, on the GPU) · torch_gib (most that torch gave
out) · card_gib (most in use of the card, with everything) · times_ours (bf16's step in ours, where bf16 does not fit) ·
failed (why there are no figures). With --profile: copy_ms and hidden_percent, see memory_worker.py. With --switches 20
there is a row for each mode of twenty changes between two checkpoints on the whole GPU, see model_switches.py.

The arithmetic is that of the GPU that is there. Where it is faster than that of the small card, a step that waits for
weights is not: times_ours is an upper limit for a slower card on the same bus.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
QUANTIZED, SECOND, DENSE = "svdq-int4_r32-synth.safetensors", "svdq-int4_r32-2.safetensors", "synth-bf16.safetensors"
OPTIONS = {"dynamic": ["--enable-dynamic-vram"], "static": ["--disable-dynamic-vram"]}
DENSE_GIB = 22.2  # a card below this cannot hold the bf16 model
LABELS = {"ours": "this pack", "bf16": "ComfyUI bf16"}


def main(args: argparse.Namespace) -> None:
    """Print the rows as they come."""
    if args.prepare:
        prepare(args)
        return
    command = [sys.executable, __file__, args.comfyui, str(args.folder), "--models", args.models, "--prepare"]
    command += ["--switches", str(args.switches)]
    subprocess.run(command, check=True)  # a process of its own, so that nothing of it stays on the GPU
    for row in itertools.chain(rows(args), switches(args) if args.switches else ()):
        print("ROW " + json.dumps(row), flush=True)


def prepare(args: argparse.Namespace) -> None:
    """Write the files that are not there yet."""
    from comfyui_process import start_comfyui
    from full_size import register_package
    from full_size_files import write_all

    register_package()
    start_comfyui(args.comfyui, ["--disable-dynamic-vram"])
    write_all(
        args.folder,
        dense="bf16" in args.models.split(","),
        second=args.switches > 0,
        update=lambda text: print(text, file=sys.stderr, flush=True),
    )


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each card, mode and model."""
    for gib in map(float, args.caps.split(",")):
        for mode in args.modes.split(","):
            ours = None
            for model in args.models.split(","):
                settings = {"model": model, "gib": gib, "mode": mode, "size": args.size, "steps": args.steps}
                settings |= {"images": args.images, "profile": args.profile}
                row = {"label": LABELS[model], **settings, **measure(args, settings)}
                if model == "ours":
                    ours = row.get("step_s")
                elif ours and "step_s" in row and gib < DENSE_GIB:
                    row["times_ours"] = round(row["step_s"] / ours, 2)
                yield row


def switches(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of model_switches.py for each mode."""
    files = [str(args.folder / name) for name in (QUANTIZED, SECOND)]
    for mode in args.modes.split(","):
        command = [sys.executable, str(HERE / "model_switches.py"), args.comfyui, *files]
        command += ["--switches", str(args.switches), "--size", str(args.size), "--", *OPTIONS[mode]]
        yield {"label": LABELS["ours"], "model": "ours", "mode": mode, **outcome(command, 3 * args.timeout)}


def measure(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """What memory_worker.py finds, or why it does not."""
    worker = str(HERE / "memory_worker.py")
    return outcome([sys.executable, worker, args.comfyui, str(args.folder), json.dumps(settings)], args.timeout)


def outcome(command: list[str], timeout: int) -> dict[str, Any]:
    """The row that a script prints, or why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"finished": False, "failed": f"not finished after {timeout} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if found:
        return json.loads(found[-1][4:])
    lines = done.stderr.strip().splitlines() or ["no message"]
    return {"finished": False, "failed": f"status {done.returncode}: {lines[-1]}"[:300]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to measure; also options of ``bench``."""
    parser.add_argument("--caps", default="6,8,12,16", help="memory: cards in GiB (default: 6,8,12,16)")
    parser.add_argument("--modes", default="dynamic,static", help="memory: dynamic, static (default: both)")
    parser.add_argument("--models", default="ours,bf16", help="memory: ours, bf16 (default: both)")
    parser.add_argument("--steps", type=int, default=12, help="memory: steps of an image (default: 12)")
    parser.add_argument("--images", type=int, default=2, help="memory: images in a row (default: 2)")
    parser.add_argument("--timeout", type=int, default=120, help="memory: seconds for one row (default: 120)")
    parser.add_argument("--switches", type=int, default=0, help="memory: changes between two checkpoints (default: 0)")
    parser.add_argument("--profile", action="store_true", help="memory: how much of copying weights lies under compute")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("comfyui")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    add_options(parser)
    main(parser.parse_args())
