"""A whole model, unit by unit, so that it can be stopped at any moment and gone on with.

Finished units are kept in ``OUT.partial/<job>/``, one safetensors file each, where <job> is a hash of the settings and
of the source's size and time of change. OUT is put together from them at the end and takes its name in one step.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.int4 import RANK_MULTIPLE
from ..loaders.flux_names import LOW_RANK_LEAVES
from ..loaders.metadata import merged_metadata
from ..loaders.safetensors_file import TensorInfo, mapped_reader, problem, read_header
from ..loaders.weights import CheckpointError, FluxConfig
from ..loaders.write import Spec, check_not_read, check_target, safetensors_writer, write_tensors
from . import activations, report
from .activations import Activations, Calibration
from .convert import Facts, Unit, convert, input_sections, kept_by, specs_of, stored_names, units_of, watched_inputs
from .replay import Replay
from .solve import WEIGHT_ONLY_BETA, Recipe
from .source import Source

ALGORITHM = 3  # part of every job's hash: raise it when the same settings give other bytes
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_RANK = 128
MAX_ITERATIONS = 32
MAX_TARGET_ERROR = 0.9
SIDES = (64, 4096)  # width and height of the pictures of a calibration, in pixels
MAX_STEPS = 100
_FACTS = "facts"
WATCHING = "watching activations"  # what progress begins with while the model runs
_STATISTICS = "activations.safetensors"
_INPUTS = "inputs"  # folder of what blocks read, for GPTQ
_WORKSPACE = 4_000_000_000  # bytes on the device, for the largest unit of FLUX.1

Progress = Callable[[int, int, str], None]
"""Called with (done, in all, what comes next): counts weights, or evaluations of the model while these are watched."""


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the result, with the source and the kind of device.

    rank: 16 to 128, a multiple of 16 · dtype: "bf16" or "fp16" · iterations: rounds of branch and codes · seed ·
    gptq: error feedback, which needs a calibration · target_error: where above 0, each layer gets the smallest rank, up
    to ``rank``, whose relative output error is within it · keep_16bit, keep_int8: patterns of stock names of linears
    that are not quantized, or to eight bits instead of four (convert.kept_by).
    """

    rank: int = 32
    dtype: str = "bf16"
    iterations: int = Recipe.iterations
    seed: int = 0
    gptq: bool = False
    target_error: float = 0.0
    keep_16bit: tuple[str, ...] = ()
    keep_int8: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.rank, DTYPES[self.dtype], self.iterations, self.seed, self.target_error)

    def describe(self, calibration: Calibration | None) -> dict[str, Any]:
        """As JSON, for the metadata of the file and the report."""
        how = {"calibration": "none", "smooth_beta": WEIGHT_ONLY_BETA}
        # Without exceptions, jobs are those of versions that had none.
        settings = {name: value for name, value in asdict(self).items() if value or not name.startswith("keep_")}
        return {"algorithm": ALGORITHM, **(how if calibration is None else calibration.describe()), **settings}


@dataclass(frozen=True)
class Result:
    """nbytes: of OUT · report: what stands in OUT.report.json · resumed: units that an earlier run had done ·
    leftovers: folders of other jobs that were left alone."""

    nbytes: int
    report: dict[str, Any]
    resumed: int
    leftovers: tuple[str, ...]


def file_metadata(source: str, config: FluxConfig, rank: int) -> dict[str, str]:
    """The four strings of a merged file, with the source's name where the loader looks for the variant."""
    metadata = merged_metadata("", config, rank)
    diffusers = json.loads(metadata["config"]) | {"_name_or_path": source}
    return metadata | {"config": json.dumps(diffusers, indent=2) + "\n", "svdq.source": source}


def quantize(
    model: Source,
    out: str | os.PathLike[str],
    settings: Settings,
    metadata: Mapping[str, str],
    device: str = "cpu",
    force: bool = False,
    progress: Progress = lambda done, total, name: None,
    calibration: Calibration | None = None,
) -> Result:
    """Write the INT4 checkpoint of ``model`` to ``out`` and its report to ``out``.report.json and .report.html.

    metadata: the strings of the file's header; how the file was made is added as ``svdq.quantizer`` · device: "cpu" or
    "cuda" · calibration: of the same model; None uses the weights alone. Same model, settings, calibration and kind of
    device: same bytes, however often the work was interrupted; ``out`` is there complete or not at all. Raises
    CheckpointError for settings, weights or a target that cannot be used, and when the disk is full; finished units are
    kept then.
    """
    started, out = time.monotonic(), Path(out)
    check_not_read(out, model.files)
    check_target(out, 0, force)  # here for a name that is none, below for its size
    check_settings(settings, out, calibration is not None, model.config)
    kept = kept_by(settings.keep_16bit, settings.keep_int8, model.config, str(out))
    specs = specs_of(model.config, settings.rank, settings.recipe.dtype, kept)
    units = units_of(model.config, kept)
    described = settings.describe(calibration)
    folder = _job_folder(model, out, described, device)
    total = sum(spec.nbytes for spec in specs.values())
    weights = {unit.name: sum(_elements(model, unit)) for unit in units}
    with _explained(folder), _alone(folder.parent, out):
        done = _finished(folder, units, specs)
        # Twice the size at the end: the units and the file that is put together from them.
        check_target(out, 2 * total - sum(_nbytes(unit, specs) for unit in units if unit.name in done), force)
        count = sum(weights[name] for name in done)
        folder.mkdir(parents=True, exist_ok=True)
        missing = [unit for unit in units if unit.name not in done]
        work = _with_activations(units, missing, model, settings, calibration, folder, progress)
        with contextlib.closing(work):
            for unit, seen in work:
                progress(count, sum(weights.values()), unit.name)
                tensors, facts = convert(model, unit, settings.recipe, torch.device(device), seen)
                _save(folder / _file_name(unit), tensors, facts)
                count += weights[unit.name]
        progress(count, count, out.name)
        facts = [fact for unit in units for fact in _facts_of(folder / _file_name(unit))]
        made = {**metadata, "svdq.quantizer": json.dumps(described)}
        assembled = _assemble(folder, units, made)
        nbytes = assembled.stat().st_size
        seconds = time.monotonic() - started
        found = report.make_report(model, out.name, described, device, facts, nbytes, seconds)
        report.write_reports(folder, out, found)
        os.replace(assembled, out)
        shutil.rmtree(folder, ignore_errors=True)
    others = sorted(str(path) for path in folder.parent.iterdir()) if folder.parent.is_dir() else []
    return Result(nbytes, found, len(done), tuple(others))


def check_settings(settings: Settings, out: Path, calibrated: bool, config: FluxConfig | None) -> None:
    """Raise CheckpointError for settings that cannot be used. out: for errors · config: sizes of the model, None where
    they are not known yet."""
    rank, largest = settings.rank, MAX_RANK if config is None else min(MAX_RANK, config.hidden_size)
    if not RANK_MULTIPLE <= rank <= largest or rank % RANK_MULTIPLE:
        expected = f"a multiple of {RANK_MULTIPLE} up to {largest}"
        raise problem(str(out), "rank", rank, expected, "Choose 16, 32, 64 or 128 as rank")
    if not 0 <= settings.target_error <= MAX_TARGET_ERROR:
        expected = f"0 to {MAX_TARGET_ERROR}"
        raise problem(str(out), "target error", settings.target_error, expected, "Choose 0.1 or so")
    if not 1 <= settings.iterations <= MAX_ITERATIONS:
        expected = f"1 to {MAX_ITERATIONS}"
        raise problem(str(out), "iterations", settings.iterations, expected, "Choose another number")
    if settings.gptq and not calibrated:
        expected = "a calibration, which sees them"
        raise problem(str(out), "activations for gptq", "none", expected, "Calibrate, or leave gptq out")
    if config is not None:
        kept_by(settings.keep_16bit, settings.keep_int8, config, str(out))


def _elements(model: Source, unit: Unit) -> Iterator[int]:
    for name in unit.layers:
        size = 1
        for width in model.shapes[f"{name}.weight"]:
            size *= width
        yield size


def _nbytes(unit: Unit, specs: Mapping[str, Spec]) -> int:
    return sum(specs[name].nbytes for name in stored_names(unit, specs))


# ---- activations


def _with_activations(
    every: list[Unit],
    units: list[Unit],
    model: Source,
    settings: Settings,
    calibration: Calibration | None,
    folder: Path,
    progress: Progress,
) -> Generator[tuple[Unit, Activations | None]]:
    """Each of ``units``, which are some of every, with what has to be known of its inputs; statistics are kept in
    ``folder``."""
    if calibration is None:
        yield from ((unit, None) for unit in units)
        return
    path = folder / _STATISTICS
    names = [name for unit in every for name in watched_inputs(unit)]
    inputs = activations.load(path, names)
    with Replay(calibration.flux, calibration.run, folder / _INPUTS) as replay:
        if inputs is None and units:
            step = partial(_on_step, progress, WATCHING)
            inputs = activations.collect(calibration, names, step, replay.all if settings.gptq else None)
            activations.save(path, inputs)
        calibration.make_room(_WORKSPACE)
        moments: dict[tuple[str, int], Tensor] = {}
        for index, unit in enumerate(units):
            sections = input_sections(unit, model.shapes)
            if settings.gptq and any((name, sections[name][0].start) not in moments for name in sections):
                moments.clear()  # before the next ones take their place
                wanted = _next_sections(units[index:], model, calibration.moment_bytes)
                later = (name for other in units[index:] for name in input_sections(other, model.shapes))
                run = partial(replay.part, wanted, [name for name in later if name not in wanted])
                step = partial(_on_step, progress, f"{WATCHING} for {unit.name} and what follows")
                moments |= activations.collect_moments(calibration, wanted, step, run)
                calibration.make_room(_WORKSPACE)
            yield unit, Activations(inputs, moments)


def _next_sections(units: list[Unit], model: Source, nbytes: int) -> dict[str, list[slice]]:
    """Inputs of as many units as have room for their second moments; those of the first in any case."""
    wanted: dict[str, list[slice]] = {}
    for unit in units:
        sections = input_sections(unit, model.shapes)
        nbytes -= activations.moments_nbytes(sections)
        if wanted and nbytes < 0:
            break
        wanted |= sections
    return wanted


def _on_step(progress: Progress, what: str, done: int, total: int) -> None:
    progress(done, total, what)


# ---- finished units


def _job_folder(model: Source, out: Path, described: dict[str, Any], device: str) -> Path:
    """The results of two kinds of device differ in last bits, so each has its own job."""
    job = [described, model.fingerprint(), torch.device(device).type]
    digest = hashlib.blake2b(json.dumps(job, sort_keys=True).encode(), digest_size=8).hexdigest()
    return out.with_name(f"{out.name}.partial") / digest


def _file_name(unit: Unit) -> str:
    return f"{unit.name.replace(' ', '-')}.safetensors"


def _finished(folder: Path, units: list[Unit], specs: Mapping[str, Spec]) -> set[str]:
    """Names of the units that are there; takes away what a killed run left unfinished."""
    for stray in folder.glob(".*.part"):
        stray.unlink(missing_ok=True)
    done = set()
    for unit in units:
        path = folder / _file_name(unit)
        try:
            header = read_header(str(path))
            json.loads(header.metadata[_FACTS])
        except (CheckpointError, KeyError, ValueError):
            continue
        # A layer's rank may be its own.
        if {name: _nbytes_without_rank(name, info) for name, info in header.tensors.items()} == {
            name: _nbytes_without_rank(name, specs[name]) for name in stored_names(unit, specs)
        }:
            done.add(unit.name)
    return done


def _nbytes_without_rank(name: str, info: TensorInfo | Spec) -> int:
    return info.nbytes // info.shape[1] if name.endswith(LOW_RANK_LEAVES) else info.nbytes


@contextlib.contextmanager
def _alone(folder: Path, out: Path) -> Iterator[None]:
    """Hold the folder of unfinished work, which is made if absent, and removed if nothing is left in it.

    Raises CheckpointError if another process has it; the system frees it when that ends. Windows and some network disks
    have no such locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if os.name == "posix":
            import fcntl

            held = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, held)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                found = "another process that is quantizing to it"
                raise problem(str(out), "file", found, "one at a time", "Wait, or choose another name") from error
            except OSError:
                pass  # a disk without locks
        stack.callback(_remove_if_empty, folder)
        yield


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _save(path: Path, tensors: Mapping[str, Tensor], facts: list[Facts]) -> None:
    write_tensors(path, tensors, {_FACTS: json.dumps(facts)}, force=True)


def _facts_of(path: Path) -> list[Facts]:
    return json.loads(read_header(str(path)).metadata[_FACTS])


def _assemble(folder: Path, units: list[Unit], metadata: Mapping[str, str]) -> Path:
    """The whole file, inside the folder of the job."""
    path = folder / "whole.safetensors"
    readers, specs = {}, {}
    for unit in units:
        file = str(folder / _file_name(unit))
        read = mapped_reader(file)
        for name in read_header(file).tensors:
            tensor = read(name)
            readers[name], specs[name] = read, Spec(tensor.dtype, tuple(tensor.shape))
    with safetensors_writer(path, specs, metadata, force=True) as write:
        for name, read in readers.items():
            write(name, read(name))
    return path


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Errors of the disk and of the GPU's memory as one line that says what to do."""
    again = "run the same command again: finished layers are kept"
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        found = "a full disk" if full else error.strerror or str(error)
        remedy = f"{'Make room' if full else 'Put that right'} and {again}"
        raise problem(str(folder), "writing", found, "room for the quantized layers", remedy) from error
    except torch.cuda.OutOfMemoryError as error:
        remedy = f"Free its memory and {again}; or add --device cpu"
        raise problem(str(folder), "GPU memory", "too little", "about 3 GB free", remedy) from error
