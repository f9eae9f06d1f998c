"""`python3 benchmarks/tinyflux train OUT`: trains the demo's tiny FLUX.

Needs ComfyUI (COMFYUI_PATH) and a GPU; --smoke does without the GPU.

`glyphs` makes glyphs.safetensors from fonts again, `prompts FILE` writes prompts for the calibration of `quantize`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def register_package() -> None:
    """Make the clone importable as ``svdq``, and not this folder's modules by themselves."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    package = types.ModuleType("svdq")
    package.__path__ = [str(ROOT)]
    sys.modules["svdq"] = package


def prepare_comfyui() -> None:
    """Make ``comfy`` importable, without a GPU if there is none."""
    path = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".venv" / "ComfyUI")
    if not (path / "comfy").is_dir():
        raise SystemExit(f"error: no ComfyUI at {path}: set COMFYUI_PATH, or run `python3 . test` once")
    sys.path.insert(0, str(path))
    import torch

    sys.argv = ["main.py"] + ([] if torch.cuda.is_available() else ["--cpu"])
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="tinyflux", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train everything; parts that are in OUT already are used")
    train.add_argument("out", type=Path, metavar="OUT", help="folder for the files")
    train.add_argument("--minutes", type=float, default=7.0, help="for everything; the result is a finished model")
    train.add_argument("--autoencoder-seconds", type=float, default=65.0)
    train.add_argument("--reader-seconds", type=float, default=30.0)
    train.add_argument("--pool", type=int, default=250_000, help="encoded pictures that the transformer is trained on")
    train.add_argument("--batch", type=int, default=512)
    train.add_argument("--rate", type=float, default=2.5e-3, help="largest learning rate of the transformer")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    train.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    train.add_argument("--warm-up", action="store_true", help=argparse.SUPPRESS)
    glyphs = commands.add_parser("glyphs", help="make glyphs.safetensors from the fonts")
    glyphs.add_argument("--fonts", type=Path, action="append", default=[], metavar="DIR", help="with DejaVu's files")
    prompts = commands.add_parser("prompts", help="write a file of encoded prompts")
    prompts.add_argument("file", type=Path, metavar="FILE")
    prompts.add_argument("--count", type=int, default=32)
    args = parser.parse_args()
    register_package()
    return {"train": _train, "glyphs": _glyphs, "prompts": _prompts}[args.command](args, started)


def _train(args: argparse.Namespace, started: float) -> int:
    import torch

    from svdq.benchmarks.tinyflux.train import Settings, Trainer, train, warm_up

    workers = 0 if args.warm_up else max(1, (os.cpu_count() or 2) - 1)
    settings = Settings(
        args.out, args.minutes, args.autoencoder_seconds, args.reader_seconds, args.pool, args.batch, args.rate,
        args.seed, compiled=not args.no_compile, workers=workers,
    )  # fmt: skip
    if args.smoke:
        torch.set_num_threads(1)
        settings = Settings(
            args.out, 0.25, 1.0, 1.0, 32, 4, args.rate, args.seed, compiled=False, report=1, test=10, save=3, tested=2
        )
    if settings.compiled and not args.warm_up:
        # Beside the training of the autoencoder: the compiler leaves what it makes in its cache on disk.
        subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--warm-up"])
    trainer = Trainer(settings, started)  # before ComfyUI, which asks for the GPU when it is imported
    prepare_comfyui()
    (warm_up if args.warm_up else train)(trainer)
    return 0


def _glyphs(args: argparse.Namespace, started: float) -> int:
    from safetensors.torch import save_file

    from svdq.benchmarks.tinyflux import glyphs

    try:
        save_file({"distance": glyphs.make(args.fonts or glyphs.font_folders())}, glyphs.FILE)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{glyphs.FILE}: {glyphs.FILE.stat().st_size / 1e3:.0f} kB in {time.monotonic() - started:.1f} s")
    return 0


def _prompts(args: argparse.Namespace, started: float) -> int:
    from svdq.benchmarks.tinyflux.pictures import prompts
    from svdq.loaders.demo_assets import PROMPT_FEATURES, demo_prompt_embedding
    from svdq.quantizer.prompts import Prompt, write_prompts

    encoded = []
    for sample in prompts(args.count, seed=0, held_out=False):
        context, pooled = demo_prompt_embedding(sample.prompt, PROMPT_FEATURES, PROMPT_FEATURES)
        encoded.append(Prompt(context[0], pooled[0], 3.5))
    write_prompts(args.file, encoded, force=True)
    print(f"{args.file}: {len(encoded)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
