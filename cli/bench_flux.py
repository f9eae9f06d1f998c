"""``bench flux``: one step of FLUX inside ComfyUI, this pack beside ComfyUI's own formats, all in one run.

benchmarks/flux.py measures; this starts it, first for two starts of ComfyUI, with nothing compiled and with what the
first one left in Triton's cache, then with dynamic VRAM and without, and puts the rows together.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from . import ROOT, UserError
from .comfy_server import has_accelerator
from .environment import comfyui_path

PEERS = ("bf16", "ours", "ours-int8", "ours-lora", "ours-int8-lora", "ours-rank0", "bf16-cudnn", "fp8", "int8", "int4",
         "nf4", "bf16-compile", "ours-compile", "fp8-compile")  # fmt: skip
COLUMNS = ("run", "label", "size", "batch", "wall_ms", "spread_ms", "host_ms", "loop_ms", "gpu_ms", "kernels",
           "weights_gib", "peak_gib", "load_s", "first_s", "distance",
           "product_ms", "attention_ms", "quantize_ms", "expand_ms", "other_ms", "add_s", "strength_s", "remove_s",
           "lora_ms", "lora_percent", "lora_loop_percent", "failed")  # fmt: skip
_RUNS = (  # name, peers (None: all that were asked for), ComfyUI's options
    ("cold", ("ours",), ("--disable-dynamic-vram",)),
    ("warm", ("ours",), ("--disable-dynamic-vram",)),
    ("static", None, ("--disable-dynamic-vram",)),
    ("dynamic", ("bf16", "ours", "ours-int8"), ("--enable-dynamic-vram",)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench flux``."""
    parser.add_argument("--model", type=Path, metavar="FILE", help="flux: INT4 (default: random); quality: 16-bit")
    parser.add_argument("--sizes", default="1024,512", help="flux: image sizes in pixels (default: 1024,512)")
    parser.add_argument("--batch", type=int, default=1, help="flux: images at once (default: 1)")
    parser.add_argument("--peers", default=",".join(PEERS), help="flux: what to measure (default: all)")


def rows(args: argparse.Namespace, update: Callable[[str], None]) -> Iterator[dict]:
    """Rows as benchmarks/flux.py describes them, each with ``run``: cold (the first start: nothing is compiled), warm
    (the next one), static or dynamic (VRAM), or cpu. Raises UserError."""
    sizes = args.sizes.split(",")
    if not all(size.isdecimal() and int(size) > 0 and int(size) % 16 == 0 for size in sizes) or args.batch < 1:
        raise UserError(f"--sizes {args.sizes} --batch {args.batch}: expected multiples of 16 and at least one image")
    peers = args.peers.split(",")
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise UserError(f"--peers {unknown[0]} is not known; choose from {','.join(PEERS)}")
    comfyui = installed_comfyui()
    with _model(args.model, update) as model, tempfile.TemporaryDirectory() as cache:
        environ = os.environ | {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        gpu = has_accelerator()
        for run, only, options in _RUNS if gpu else [("cpu", None, ("--cpu",))]:
            wanted = [name for name in peers if only is None or name in only]
            if wanted:
                update(f"{run}: {', '.join(wanted)}")
                command = [sys.executable, str(ROOT / "benchmarks" / "flux.py"), str(comfyui), str(model)]
                command += ["--peers", ",".join(wanted), "--batch", str(args.batch)]
                command += ["--sizes", sizes[0] if run in ("cold", "warm") else args.sizes, "--", *options]
                for row in script_rows(command, environ):
                    update(f"{row['label']}: {row.get('wall_ms', 'failed')}")
                    yield {"run": run, **row}


def installed_comfyui() -> Path:
    """The ComfyUI to measure in. Raises UserError if there is none."""
    comfyui = comfyui_path()
    if not (comfyui / "main.py").is_file():
        raise UserError(f"there is no ComfyUI in {comfyui}; name yours in COMFYUI_PATH, or run: python3 . demo")
    return comfyui


@contextmanager
def _model(path: Path | None, update: Callable[[str], None]) -> Iterator[Path]:
    """``path``, or a full-size checkpoint with random weights that is deleted afterwards."""
    if path is not None:
        if not path.exists():
            raise UserError(f"{path} does not exist; leave --model out for a model with random weights")
        yield path
        return
    from .synth import synth

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "svdq-int4_r32-flux.1-dev-random.safetensors"
        update("writing a checkpoint with random weights, 6.8 GB")
        synth(str(made), scale="full")
        yield made


def script_rows(command: list[str], environ: dict[str, str] | None = None) -> Iterator[dict]:
    """What a script of benchmarks/ prints as "ROW {json}", as it comes. Raises UserError if the script fails."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environ)
        try:
            for line in process.stdout:
                if line.startswith("ROW "):
                    yield json.loads(line[4:])
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        if code:
            errors.seek(0)
            raise UserError(f"{' '.join(command)} ended with status {code}:\n{errors.read()[-2000:]}")
