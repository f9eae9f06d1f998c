"""``synth``: a valid SVDQuant INT4 FLUX checkpoint with random weights, laid out exactly like a published one."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..loaders.flux_names import Source
    from ..loaders.weights import FluxConfig
    from ..loaders.write import Spec, WriteTensor
    from .synth_weights import WeightMaker

# Variant -> (input channels per 2x2 patch, guidance embedder).
VARIANTS = {
    "dev": (64, True),
    "schnell": (64, False),
    "fill": (384, True),
    "canny": (128, True),
    "depth": (128, True),
    "kontext": (64, True),
    "krea": (64, True),
}
SCALES = ("tiny", "full")
DTYPES = ("bf16", "fp16")
CONTAINERS = ("single", "folder")
DEFAULT_RANK = 32
_MAX_THREADS = 8  # each holds one layer: about 150 MB at full size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="the file to write (with --format folder: the folder)")
    parser.add_argument("--variant", choices=VARIANTS, default="dev", help="default: dev")
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="tiny: 7 MB (default); full: 6.8 GB")
    parser.add_argument("--rank", type=int, default=DEFAULT_RANK, help="of the low-rank branch, a multiple of 16")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of scales and 16-bit layers; default: bf16")
    parser.add_argument("--format", choices=CONTAINERS, default="single", help="single file or legacy folder")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument("--force", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> int:
    from .console import StatusLine

    started = time.monotonic()
    status = StatusLine()
    nbytes = synth(
        args.out, args.variant, args.scale, args.seed, args.rank, args.dtype, args.format, args.force,
        progress=lambda done, total: status.update(f"{args.out}: {done / total:4.0%}"),
    )  # fmt: skip
    status.clear()
    print(f"{args.out}: {nbytes / 1e6:,.1f} MB in {time.monotonic() - started:.1f} s")
    return 0


def synth(
    path: str | os.PathLike[str],
    variant: str = "dev",
    scale: str = "tiny",
    seed: int = 0,
    rank: int | None = None,
    dtype: str = "bf16",
    container: str = "single",
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a checkpoint with random weights to ``path`` and return its size in bytes.

    The arguments are the command's options; ``rank`` None is 32, rank 0 leaves the low-rank tensors out. ``progress``
    is called with (layers done, layers in all). The path appears complete or not at all. Raises CheckpointError if it
    exists (without ``force``), if the rank does not fit the format, or if the disk is too full.
    """
    import torch

    from ..kernels.int4 import RANK_MULTIPLE
    from ..loaders.metadata import merged_metadata
    from ..loaders.safetensors_file import problem
    from .synth_weights import STYLES, WeightMaker, tensor_specs

    path = Path(path)
    rank = DEFAULT_RANK if rank is None else rank
    if rank < 0 or rank % RANK_MULTIPLE:
        raise problem(str(path), "rank", rank, f"a multiple of {RANK_MULTIPLE}", "Choose 16, 32, 64 or 128")
    config = flux_config(variant, scale)
    specs = tensor_specs(config, rank, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    maker = WeightMaker(config, specs, seed, STYLES[scale])
    metadata = merged_metadata(variant, config, rank)
    with (_single_file if container == "single" else _legacy_folder)(path, specs, metadata, force) as write:
        _make_all(maker, write, progress)
    files = [path] if path.is_file() else path.iterdir()
    return sum(file.stat().st_size for file in files)


def flux_config(variant: str, scale: str) -> FluxConfig:
    """Sizes of a variant, as published ("full") or small enough for a CPU ("tiny")."""
    from ..loaders.weights import FluxConfig

    in_channels, guidance = VARIANTS[variant]
    sizes = (3072, 19, 38, 4096, 768) if scale == "full" else (256, 2, 2, 128, 64)
    hidden, depth, depth_single, context, vector = sizes
    return FluxConfig(hidden, depth, depth_single, in_channels, 64, context, vector, guidance)


def _make_all(maker: WeightMaker, write: WriteTensor, progress: Callable[[int, int], None]) -> None:
    from concurrent.futures import ThreadPoolExecutor, as_completed

    layers = maker.layers()

    def make(source: Source) -> None:
        for name, tensor in maker.tensors(source):
            write(name, tensor)

    pool = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))
    try:
        futures = [pool.submit(make, source) for source in layers]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            progress(done, len(layers))
    finally:
        # After an error or Ctrl-C: without this the pool would first make all the other layers.
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _single_file(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], force: bool
) -> Iterator[WriteTensor]:
    from ..loaders.write import safetensors_writer

    with safetensors_writer(path, specs, metadata, force) as write:
        yield write


@contextlib.contextmanager
def _legacy_folder(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], force: bool
) -> Iterator[WriteTensor]:
    """The two files and two configurations of a legacy folder, made beside ``path`` and then moved there."""
    from ..loaders.legacy import BLOCKS_FILE, OUTER_FILE
    from ..loaders.safetensors_file import problem
    from ..loaders.write import check_target, safetensors_writer

    if path.exists() and not (force and path.is_dir()):
        remedy = "Choose another name" + (" or add --force" if path.is_dir() else "")
        raise problem(str(path), "folder", "something that exists", "a new folder", remedy)
    check_target(path / BLOCKS_FILE if path.is_dir() else path, sum(spec.nbytes for spec in specs.values()), force=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    blocks = {name: spec for name, spec in specs.items() if "transformer_blocks." in name}
    outer = {name: spec for name, spec in specs.items() if name not in blocks}
    try:
        unfinished.mkdir()
        with (
            safetensors_writer(unfinished / BLOCKS_FILE, blocks, {}) as write_block,
            safetensors_writer(unfinished / OUTER_FILE, outer, {}) as write_outer,
        ):
            yield lambda name, tensor: (write_block if name in blocks else write_outer)(name, tensor)
        for name in ("config", "comfy_config"):
            (unfinished / f"{name}.json").write_text(metadata[name], encoding="utf-8")
        if path.is_dir():
            for file in unfinished.iterdir():
                os.replace(file, path / file.name)
        else:
            os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
