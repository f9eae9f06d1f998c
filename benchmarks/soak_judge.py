"""What a soak's runs gave, and what of it is wrong. Imports neither torch nor ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from process_memory import growth
from soak_plan import NAMED, REFUSED, Run

LOST = ("crashed", "stuck")
WARM_SAMPLES = 8  # fewer say nothing of growth
LIMITS = {"ram": 16.0, "vram": 16.0, "torch": 16.0, "tensors": 20.0}  # growth; MB and tensors


@dataclass(frozen=True)
class Outcome:
    """What came of a run. ended: finished, interrupted, refused, crashed or stuck · hashes: of latent and image ·
    computed: whether the sampler ran, not ComfyUI's cache · where, message: node type and text of an error ·
    complaints: what ComfyUI's log says of LoRAs that do not fit."""

    run: Run
    ended: str
    hashes: tuple[str, ...] = ()
    finite: bool = True
    computed: bool = True
    where: str = ""
    message: str = ""
    complaints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Memory with everything unloaded, after ``run`` (counted from 0): MB in RAM, on the GPU, of torch's on the GPU
    (None where there is none), and tensors."""

    run: int
    ram: float | None
    vram: float | None
    torch: float | None
    tensors: int


def judge(outcomes: Sequence[Outcome], samples: Sequence[Sample]) -> tuple[dict[str, Any], list[str]]:
    """The row, but for what soak() adds, and what went wrong."""
    problems: list[str] = []
    known: dict[Any, tuple[int, tuple[str, ...]]] = {}  # configuration -> its first run, and what that gave
    pictures: dict[tuple[str, ...], tuple[int, Any]] = {}  # hashes -> the first run with them, and its picture
    repeats = differ = warm = 0
    for number, outcome in enumerate(outcomes):
        run = outcome.run
        problems += [f"run {number} ({run.kind}; {run.changed}): {what}" for what in _wrong(outcome)]
        if outcome.ended != "finished" or run.kind not in ("plain", *NAMED):
            continue
        wanted = run.configuration
        if wanted not in known:
            known[wanted], warm = (number, outcome.hashes), number
            other, picture = pictures.setdefault(outcome.hashes, (number, wanted.picture))
            if picture != wanted.picture:
                problems.append(f"run {number} ({wanted}) has the image of run {other}, which is another one")
            continue
        repeats += 1
        before, hashes = known[wanted]
        if outcome.hashes != hashes:
            differ += 1
            what = "latent" if outcome.hashes[0] != hashes[0] else "image of the same latent"
            problems.append(f"run {number} ({run.kind}; {wanted}): another {what} than in run {before}")
    ended = [outcome.ended for outcome in outcomes]
    asked = [outcome for outcome in outcomes if outcome.run.kind == "interrupted"]
    if asked and "interrupted" not in ended:
        problems.append(f"none of {len(asked)} interrupts came in time")
    grown = {what: _growth(samples, what, warm) for what in LIMITS}
    problems += [
        f"{what} grew by {value} from the first warm samples to the last, more than {LIMITS[what]}"
        for what, value in grown.items()
        if value is not None and value > LIMITS[what]
    ]
    row = {
        "runs": len(outcomes),
        "finished": ended.count("finished"),
        "interrupted": ended.count("interrupted"),
        "refused": sum(o.ended == "refused" and o.run.kind in REFUSED for o in outcomes),
        "crashes": sum(ended.count(how) for how in LOST),
        "configurations": len(known),
        "repeats": repeats,
        "differ": differ,
        "ram_growth_mb": grown["ram"],
        "vram_growth_mb": grown["vram"],
        "torch_growth_mb": grown["torch"],
        "tensor_growth": grown["tensors"],
    }
    return row, problems


def _wrong(outcome: Outcome) -> Iterator[str]:
    """What is wrong with one run by itself."""
    kind, ended = outcome.run.kind, outcome.ended
    if ended in LOST:
        yield f"{ended}: {outcome.message}"
    elif kind in REFUSED:
        if ended != "refused":
            yield f"{ended}, expected an error"
        elif outcome.where != REFUSED[kind]:
            yield f"{outcome.where} failed, expected {REFUSED[kind]}: {outcome.message}"
        elif kind == "nan" and "NaN" not in outcome.message:
            yield f"the error does not say why: {outcome.message}"
    elif ended == "refused":
        yield f"{outcome.where} failed: {outcome.message}"
    elif kind in NAMED and not outcome.complaints:
        yield "the log does not name the LoRA's keys"
    elif kind not in NAMED and outcome.complaints:
        yield f"the log complains: {outcome.complaints[0]}"
    elif ended == "interrupted" and kind != "interrupted":
        yield "interrupted, which nobody asked for"
    elif not outcome.finite:
        yield "the image is not finite"
    elif not outcome.computed:
        yield "the sampler's result came from ComfyUI's cache"


def _growth(samples: Sequence[Sample], what: str, warm: int) -> float | None:
    """Of one thing between the first and the last quarter of the samples after run ``warm``; None if there are few."""
    values = [getattr(sample, what) for sample in samples if sample.run >= warm]
    values = [value for value in values if value is not None]
    return growth(values, len(values) // 4) if len(values) >= WARM_SAMPLES else None
