"""A real ComfyUI server under random work: no crash, no leak, and the same configuration always gives the same bits.

    python benchmarks/soak.py COMFYUI [--runs 200] [--seed 0] [--json] [--log FILE] [-- ComfyUI's options]

Starts ComfyUI's main.py with this pack and queues RUNS prompts over HTTP: two small checkpoints in random precisions,
up to three LoRAs behind each other, random sizes, batches, steps and samplers (soak_plan.py). Some prompts are
interrupted, some have a LoRA that is truncated, has NaN or is for another model, or ask for arithmetic that the device
has not; now and then ComfyUI is told to unload its models or to forget its results. What was computed is compared by
hashes of latent and image.

ComfyUI's cache cannot make that trivial: each prompt has another negative text, which CFG 1 does not use but which lets
the sampler and all behind it run again. Loaders and LoRA nodes may be cached, as for a person who works: the server
gets --cache-lru, because ComfyUI's usual cache grows until RAM is short, which would look like a leak.

Prints one row: runs · finished · interrupted · refused (bad LoRA or precision, as expected) · crashes · configurations
· repeats, differ (finished runs of a configuration that was there before, and how many of them gave other bits) ·
first_same (whether the first pass of the process, which warms up and is not compared, gave the bits of later ones) ·
ram_growth_mb, vram_growth_mb, torch_growth_mb, tensor_growth (with everything unloaded; from the first quarter of the
samples after each configuration was there once to the last quarter, medians; VRAM is the whole GPU's, torch is what its
allocator has given out of it) · seconds · device, and with --json also each sample, what the refusals said, and
problems. Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from full_size import register_package
from soak_plan import LEAST_RUNS

HERE = Path(__file__).resolve().parent
CACHED_NODES = 60  # results that ComfyUI keeps: about those of six prompts


def install_nodes(custom_nodes: Path) -> None:
    """Give a server soak_nodes.py."""
    folder = custom_nodes / "soak"
    folder.mkdir(parents=True)
    shutil.copyfile(HERE / "soak_nodes.py", folder / "__init__.py")
    shutil.copyfile(HERE / "process_memory.py", folder / "process_memory.py")


def main(args: argparse.Namespace, options: list[str]) -> int:
    """Run and report; returns the exit code."""
    register_package()
    from soak_files import write_models
    from soak_server import soak

    from svdq.cli.comfy_server import ComfyServer
    from svdq.cli.console import StatusLine

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        base = Path(folder)
        write_models(base / "models", args.seed)
        install_nodes(base / "custom_nodes")
        if not any(option.startswith("--cache") for option in options):
            options = [*options, "--cache-lru", str(CACHED_NODES)]
        server = ComfyServer(
            base,
            comfyui=args.comfyui.resolve(),
            cpu=True if "--cpu" in options else None,
            extra_arguments=[option for option in options if option != "--cpu"],
            pack_name="svdq-flux-soak",
            log=args.log,
            environ={"OMP_NUM_THREADS": "1"},  # the models are so small that threads wait longer than they compute
        )
        with server:
            row, problems = soak(server, args.runs, args.seed, StatusLine(sys.stderr))
    for problem in problems:
        print(f"soak: {problem}", file=sys.stderr)
    if args.json:
        print(json.dumps(row | {"options": options, "problems": problems}))
    else:
        print(" · ".join(f"{name} {value}" for name, value in row.items() if not isinstance(value, dict | list)))
    return 1 if problems else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--runs", type=int, default=200, help=f"at least {LEAST_RUNS} (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the row as JSON, with samples and messages")
    parser.add_argument("--log", type=Path, help="where ComfyUI's log goes (default: deleted)")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:split])
    if args.runs < LEAST_RUNS:
        parser.error(f"--runs {args.runs}: expected {LEAST_RUNS} at least")
    if not (args.comfyui / "main.py").is_file():
        parser.error(f"{args.comfyui}: there is no main.py, expected ComfyUI's folder")
    sys.exit(main(args, sys.argv[split + 1 :]))
