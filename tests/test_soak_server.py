"""benchmarks/soak.py: what it plans, what it finds wrong, and a short soak on the CPU and long ones on a GPU."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from conftest import ROOT, find_comfyui
from server_fixture import unavailable

sys.path.append(str(ROOT / "benchmarks"))

import soak_server
from soak_judge import LIMITS, Outcome, Sample, judge
from soak_plan import LEAST_RUNS, NAMED, REFUSED, plan

from svdq.cli.comfy_client import ConnectionLost

PRECISIONS, MISSING = ("auto", "int8", "16bit"), ("int4",)


# ---- the plan


@pytest.mark.parametrize("runs", [LEAST_RUNS, 37, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_plan(runs: int, seed: int) -> None:
    """As many runs as asked for, of every kind; most configurations come again, a bad run's at once."""
    found = plan(runs, seed, PRECISIONS, MISSING)
    assert len(found) == runs and found == plan(runs, seed, PRECISIONS, MISSING)
    assert found != plan(runs, seed + 1, PRECISIONS, MISSING)
    kinds = Counter(run.kind for run in found)
    assert kinds.keys() == {"plain", "interrupted", *REFUSED, *NAMED}
    assert kinds["interrupted"] >= runs // 10 and kinds["plain"] >= runs // 2
    plain = Counter(run.configuration for run in found if run.kind == "plain")
    assert len(plain) <= kinds["plain"] / 2 + 1, "most come several times"
    for run, following in itertools.pairwise(found):
        if run.kind != "plain":
            assert following.configuration == run.configuration and following.weights == run.weights
            assert run.changed != run.configuration
    assert found[-1].kind == "plain"
    if runs == 200:
        assert {len(one.loras) for one in plain} == {0, 1, 2, 3}
        assert {one.precision for one in plain} == set(PRECISIONS)
        assert len({one.model for one in plain}) == 2
        assert any(strength < 0 for one in plain for _, strength in one.loras)
        assert {run.free_during for run in found if run.free} == {True, False}


def test_plan_without_a_precision_that_cannot_run() -> None:
    assert "unavailable" not in {run.kind for run in plan(200, 0, ["auto"])}


def test_prompts_differ_in_what_does_not_matter() -> None:
    """Two prompts of one configuration: only the negative text differs, which CFG 1 does not use."""
    one = plan(LEAST_RUNS, 0, PRECISIONS, MISSING)[0].configuration
    first, second = one.prompt("auto", 1), one.prompt("auto", 2)
    assert {name for name in first if first[name] != second[name]} == {"negative"}
    assert first["sampler"]["inputs"]["cfg"] == 1.0


# ---- the judgement


@pytest.fixture
def outcomes() -> list[Outcome]:
    """What a soak gives that finds nothing."""
    found = []
    for run in plan(LEAST_RUNS, 0, PRECISIONS, MISSING):
        hashes = (f"latent {hash(run.configuration.picture)}", f"image {hash(run.configuration.picture)}")
        if run.kind in REFUSED:
            found.append(Outcome(run, "refused", where=REFUSED[run.kind], message="it has NaN"))
        elif run.kind == "interrupted":
            found.append(Outcome(run, "interrupted"))
        else:
            found.append(Outcome(run, "finished", hashes, complaints=("[ERROR] ERROR lora",) * (run.kind in NAMED)))
    return found


def first_of(outcomes: list[Outcome], kind: str) -> int:
    """The place of the first outcome of a kind; if it has an image, of one whose configuration was there before."""
    known = set()
    for place, outcome in enumerate(outcomes):
        if outcome.run.kind == kind and (outcome.ended != "finished" or outcome.run.configuration in known):
            return place
        if outcome.ended == "finished":
            known.add(outcome.run.configuration)
    raise AssertionError(f"no {kind} run")


def test_nothing_is_wrong(outcomes: list[Outcome]) -> None:
    row, problems = judge(outcomes, [])
    assert problems == []
    ended = {"finished": LEAST_RUNS - 4, "interrupted": 1, "refused": 3, "crashes": 0, "differ": 0}
    assert row.items() >= ended.items()
    assert row["repeats"] == row["finished"] - row["configurations"] > 0
    assert row["ram_growth_mb"] is None, "too few samples"


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "another latent": ("plain", {"hashes": ("other", "other")}, "another latent than in run"),
    "another image": ("plain", {"hashes": None}, "another image of the same latent than in run"),
    "after a LoRA of another size": ("sizes", {"hashes": ("other", "other")}, "another latent than in run"),
    "crash": ("plain", {"ended": "crashed", "message": "exit code -9"}, "crashed: exit code -9"),
    "hang": ("plain", {"ended": "stuck", "message": "not done after 300 s"}, "stuck: not done after 300 s"),
    "error": ("plain", {"ended": "refused", "where": "KSampler", "message": "boom"}, "KSampler failed: boom"),
    "error after a LoRA of another size": ("sizes", {"ended": "refused", "where": "KSampler"}, "KSampler failed"),
    "NaN": ("plain", {"finite": False}, "the image is not finite"),
    "from the cache": ("plain", {"computed": False}, "the sampler's result came from ComfyUI's cache"),
    "a truncated LoRA is taken": ("truncated", {"ended": "finished"}, "finished, expected an error"),
    "refused too late": ("nan", {"where": "KSampler"}, "KSampler failed, expected LoraLoaderModelOnly"),
    "refused without a reason": ("nan", {"message": "something failed"}, "the error does not say why: something"),
    "not named": ("sdxl", {"complaints": ()}, "the log does not name the LoRA's keys"),
    "named for nothing": ("plain", {"complaints": ("lora key not loaded: x",)}, "the log complains: lora key"),
    "interrupted by itself": ("plain", {"ended": "interrupted"}, "interrupted, which nobody asked for"),
    "not interrupted": ("interrupted", {"ended": "finished"}, "none of 1 interrupts came in time"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str, outcomes: list[Outcome]) -> None:
    kind, changes, message = WRONG[name]
    place = first_of(outcomes, kind)
    if changes.get("hashes", ()) is None:
        changes = {"hashes": (outcomes[place].hashes[0], "other")}
    outcomes[place] = replace(outcomes[place], **changes)
    row, problems = judge(outcomes, [])
    assert len(problems) == 1 and message in problems[0], problems
    assert row["differ"] == ("hashes" in changes)
    assert row["crashes"] == (name in ("crash", "hang"))
    if name != "not interrupted":
        assert problems[0].startswith(f"run {place} ({kind}; "), "says which run it was"


def test_the_same_image_for_different_configurations(outcomes: list[Outcome]) -> None:
    """As if a LoRA did nothing; but two ways to compute the same picture may agree."""
    pictures = list(dict.fromkeys(o.run.configuration.picture for o in outcomes))
    same = [replace(o, hashes=("a", "a")) if o.run.configuration.picture in pictures[:2] else o for o in outcomes]
    assert [problem for problem in judge(same, [])[1] if "which is another one" in problem]
    other_way = [replace(o.run.configuration, precision="another") for o in outcomes]
    runs = [replace(o, run=replace(o.run, configuration=c)) for o, c in zip(outcomes, other_way, strict=True)]
    row, problems = judge([*outcomes, *runs], [])
    assert problems == [] and row["configurations"] == 2 * judge(outcomes, [])[0]["configurations"]


@pytest.mark.parametrize("what", LIMITS)
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_growth_is_named_beyond_the_limit(what: str, share: float, outcomes: list[Outcome]) -> None:
    """After everything was there once: what grows while the process warms up does not count."""
    noise = [0, 3, 1, 2] * 10
    samples = [Sample(run, 500.0, 900.0, 40.0, 36) for run in range(40)]
    grown = [
        replace(sample, **{what: getattr(sample, what) + noise[run] + (share * LIMITS[what] * run / 30)})
        for run, sample in enumerate(samples)
    ]
    row, problems = judge(outcomes, [replace(sample, run=sample.run + len(outcomes)) for sample in grown])
    key = {"tensors": "tensor_growth"}.get(what, f"{what}_growth_mb")
    assert row[key] == pytest.approx(share * LIMITS[what], rel=0.15)
    assert [problem.split()[0] for problem in problems] == ([what] if share > 1 else [])
    warming = [replace(sample, run=-1) for sample in grown]
    assert judge(outcomes, [*warming, *(replace(s, run=99) for s in samples)]) == judge(
        outcomes, [replace(s, run=99) for s in samples]
    )


# ---- the work


class DyingServer:
    """A server that ends in its fourth prompt."""

    def __init__(self, log) -> None:
        self.log, self.client, self.prompts = log, self, 0
        log.write_text("")

    def system_stats(self) -> dict[str, Any]:
        return {"devices": [{"name": "cpu", "type": "cpu"}]}

    def post_json(self, path: str, data: Any) -> None:
        pass

    def run(self, prompt: dict[str, Any], **_: Any) -> dict[str, Any]:
        self.prompts += 1
        if self.prompts == 4:
            raise ConnectionLost("ComfyUI closed the connection")
        return {"outputs": {"record": {"sha256": [str(prompt), ""], "finite": [True, True]}}}

    def is_running(self) -> bool:
        return self.prompts < 4

    def exit_reason(self) -> str:
        return "ComfyUI stopped with exit code -11"


def test_a_crash_ends_the_soak_and_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [run for run in plan(200, 0, ["auto"]) if run.kind == "plain"]
    monkeypatch.setattr(soak_server, "plan", lambda *_: plain)

    class Status:
        def update(self, text: str) -> None: ...
        def clear(self) -> None: ...

    row, problems = soak_server.soak(DyingServer(tmp_path / "log"), 200, 0, Status())
    assert row["runs"] == 3 and row["crashes"] == 1 and row["finished"] == 2
    assert problems[-1].startswith("run 2 (plain; ") and problems[-1].endswith("ComfyUI stopped with exit code -11")


def start_soak(runs: int, options: tuple[str, ...], seconds: int, **environ: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, row, what it said) of benchmarks/soak.py."""
    if find_comfyui() is None:
        unavailable("no ComfyUI: run `python3 . test`, or set COMFYUI_PATH")
    script = ROOT / "benchmarks" / "soak.py"
    command = [sys.executable, script, find_comfyui(), "--runs", runs, "--json", "--", *options]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=seconds, env=os.environ | environ
    )
    assert done.stdout, done.stderr[-4000:]
    return done.returncode, json.loads(done.stdout), done.stderr[-4000:]


@pytest.mark.server
@pytest.mark.slow
def test_a_short_soak_on_the_cpu() -> None:
    code, row, said = start_soak(LEAST_RUNS, ("--cpu",), 300, SVDQ_BACKEND="int4-reference")
    assert code == 0 and row["problems"] == [], said
    assert row["runs"] == LEAST_RUNS and row["crashes"] == 0
    assert row["repeats"] >= 4 and row["differ"] == 0
    assert row["interrupted"] == 1
    assert row["refusals"].keys() == {"truncated", "nan"}
    assert "incomplete" in row["refusals"]["truncated"]
    assert "found NaN or infinite values" in row["refusals"]["nan"]


@pytest.mark.gpu
@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--enable-dynamic-vram", "--disable-dynamic-vram"])
def test_a_soak_on_a_gpu(mode: str) -> None:
    code, row, said = start_soak(200, (mode,), 900)
    print({name: value for name, value in row.items() if name != "samples"})
    assert code == 0 and row["problems"] == [], said
    assert row["runs"] == 200 and row["crashes"] == row["differ"] == 0
    assert row["interrupted"] >= 10 and row["refused"] >= 16 and row["repeats"] >= 100
    growth = [row[f"{what}_growth_mb"] for what in ("ram", "vram", "torch")]
    assert None not in growth
