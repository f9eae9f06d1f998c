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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.int4 import RANK_MULTIPLE
from ..loaders.safetensors_file import mapped_reader, problem, read_header
from ..loaders.weights import CheckpointError
from ..loaders.write import Spec, check_target, safetensors_writer
from .convert import Facts, Unit, convert, specs_of, stored_names, units_of
from .solve import WEIGHT_ONLY_BETA, Recipe
from .source import DenseModel

ALGORITHM = 1  # part of every job's hash: raise it when the same settings give other bytes
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_RANK = 128
_FACTS = "facts"

Progress = Callable[[int, int, str], None]
"""Called with (weights done, weights in all, unit that comes next)."""


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the result, with the source and the kind of device.

    rank: 16 to 128, a multiple of 16 · dtype: "bf16" or "fp16" · iterations: rounds of branch and codes · seed.
    """

    rank: int = 32
    dtype: str = "bf16"
    iterations: int = Recipe.iterations
    seed: int = 0

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.rank, DTYPES[self.dtype], self.iterations, self.seed)

    def describe(self) -> dict[str, Any]:
        """As JSON, for the metadata of the file and the report."""
        return {"algorithm": ALGORITHM, "calibration": "none", "smooth_beta": WEIGHT_ONLY_BETA, **asdict(self)}


@dataclass(frozen=True)
class Result:
    """nbytes: of OUT · report: what stands in OUT.report.json · resumed: units that an earlier run had done ·
    leftovers: folders of other jobs that were left alone."""

    nbytes: int
    report: dict[str, Any]
    resumed: int
    leftovers: tuple[str, ...]


def report_path(out: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(out)}.report.json")


def quantize(
    model: DenseModel,
    out: str | os.PathLike[str],
    settings: Settings,
    metadata: Mapping[str, str],
    device: str = "cpu",
    force: bool = False,
    progress: Progress = lambda done, total, name: None,
) -> Result:
    """Write the INT4 checkpoint of ``model`` to ``out`` and its report to ``out``.report.json.

    metadata: the strings of the file's header; how the file was made is added as ``svdq.quantizer`` · device: "cpu" or
    "cuda". Same model, settings and kind of device: same bytes, however often the work was interrupted; ``out`` is
    there complete or not at all. Raises CheckpointError for settings, weights or a target that cannot be used, and when
    the disk is full; finished units are kept then.
    """
    started, out = time.monotonic(), Path(out)
    _check(model, out, settings)
    specs = specs_of(model.config, settings.rank, settings.recipe.dtype)
    units = units_of(model.config)
    folder = _job_folder(model, out, settings, device)
    done = _finished(folder, units, specs)
    # Twice the size at the end: the units and the file that is put together from them.
    total = sum(spec.nbytes for spec in specs.values())
    check_target(out, 2 * total - sum(_nbytes(unit, specs) for unit in units if unit.name in done), force)

    weights = {unit.name: sum(_elements(model, unit)) for unit in units}
    count = sum(weights[name] for name in done)
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for unit in units:
            if unit.name in done:
                continue
            progress(count, sum(weights.values()), unit.name)
            tensors, facts = convert(model, unit, settings.recipe, torch.device(device))
            _save(folder / _file_name(unit), tensors, {name: specs[name] for name in tensors}, facts)
            count += weights[unit.name]
        progress(count, count, out.name)
        facts = [fact for unit in units for fact in _facts_of(folder / _file_name(unit))]
        made = {**metadata, "svdq.quantizer": json.dumps(settings.describe())}
        assembled = _assemble(folder, units, specs, made)
        nbytes = assembled.stat().st_size
        report = _report(model, out, settings, device, facts, nbytes, time.monotonic() - started)
        _write_report(folder, report_path(out), report)
        os.replace(assembled, out)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
    others = sorted(str(path) for path in folder.parent.iterdir()) if folder.parent.is_dir() else []
    return Result(nbytes, report, len(done), tuple(others))


def _check(model: DenseModel, out: Path, settings: Settings) -> None:
    rank, largest = settings.rank, min(MAX_RANK, model.config.hidden_size)
    if not RANK_MULTIPLE <= rank <= largest or rank % RANK_MULTIPLE:
        expected = f"a multiple of {RANK_MULTIPLE} up to {largest}"
        raise problem(str(out), "rank", rank, expected, "Choose 16, 32, 64 or 128 with --rank")
    if settings.iterations < 1:
        raise problem(str(out), "iterations", settings.iterations, "1 or more", "Choose another number")
    if out.exists() and any(os.path.samefile(out, header.path) for header in model.headers):
        raise problem(str(out), "file", "the model that is read", "another file", "Choose another name")


def _elements(model: DenseModel, unit: Unit) -> Iterator[int]:
    for name in unit.layers:
        size = 1
        for width in model.shapes[f"{name}.weight"]:
            size *= width
        yield size


def _nbytes(unit: Unit, specs: Mapping[str, Spec]) -> int:
    return sum(specs[name].nbytes for name in stored_names(unit, specs))


# ---- finished units


def _job_folder(model: DenseModel, out: Path, settings: Settings, device: str) -> Path:
    """The results of two kinds of device differ in last bits, so each has its own job."""
    job = [settings.describe(), model.fingerprint(), torch.device(device).type]
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
        if {name: info.nbytes for name, info in header.tensors.items()} == {
            name: specs[name].nbytes for name in stored_names(unit, specs)
        }:
            done.add(unit.name)
    return done


def _save(path: Path, tensors: Mapping[str, Tensor], specs: Mapping[str, Spec], facts: list[Facts]) -> None:
    with safetensors_writer(path, specs, {_FACTS: json.dumps(facts)}, force=True) as write:
        for name, tensor in tensors.items():
            write(name, tensor)


def _facts_of(path: Path) -> list[Facts]:
    return json.loads(read_header(str(path)).metadata[_FACTS])


def _assemble(folder: Path, units: list[Unit], specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> Path:
    """The whole file, inside the folder of the job."""
    path = folder / "whole.safetensors"
    with safetensors_writer(path, specs, metadata, force=True) as write:
        for unit in units:
            read = mapped_reader(str(folder / _file_name(unit)))
            for name in stored_names(unit, specs):
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


# ---- report


def _report(
    model: DenseModel,
    out: Path,
    settings: Settings,
    device: str,
    facts: list[Facts],
    nbytes: int,
    seconds: float,
) -> dict[str, Any]:
    kinds = {}
    for kind in ("w4a4", "w4a16"):
        chosen = [fact for fact in facts if fact["kind"] == kind]
        kinds[kind] = {"layers": len(chosen)} | {
            name: _spread([fact[name] for fact in chosen]) for name in ("weight_sqnr_db", "output_sqnr_db")
        }
    return {
        "version": 1,
        "source": os.path.basename(os.path.abspath(model.path)),
        "file": out.name,
        "settings": settings.describe(),
        "device": device,
        "bytes": nbytes,
        "source_bytes": sum(header.file_bytes for header in model.headers),
        "seconds": round(sum(fact["seconds"] for fact in facts), 1),
        "seconds_of_the_last_run": round(seconds, 1),
        "summary": kinds,
        "layers": facts,
    }


def _spread(values: list[float | None]) -> dict[str, float] | None:
    """Smallest and mean; exact layers (None) do not count."""
    known = [value for value in values if value is not None]
    return {"min": min(known), "mean": round(sum(known) / len(known), 2)} if known else None


def _write_report(folder: Path, path: Path, report: dict[str, Any]) -> None:
    unfinished = folder / "report.json"
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
