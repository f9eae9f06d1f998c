"""``bench memory`` without a GPU: rows from what a worker would say, how spans are counted, and what is refused."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, find_comfyui

pytest.importorskip("triton")
sys.path.append(str(ROOT / "benchmarks"))

import memory_worker
import model_switches

from svdq.benchmarks import memory_caps
from svdq.cli import RESTARTED, bench_memory, main


@pytest.fixture(autouse=True)
def this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RESTARTED, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    memory_caps.add_options(parser)
    found = parser.parse_args(words)
    found.comfyui, found.folder, found.size = "comfyui", Path("folder"), 1024
    return found


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each card, mode and model; one that says nothing or never ends is a row as well."""
    started: list[dict[str, Any]] = []

    def run(command: list[str], timeout: int, **_: object) -> subprocess.CompletedProcess:
        settings = json.loads(command[-1])
        started.append(settings)
        if settings["model"] == "bf16" and settings["gib"] == 6:
            raise subprocess.TimeoutExpired(command, timeout)
        if settings["model"] == "bf16" and settings["mode"] == "static":
            return subprocess.CompletedProcess(command, -9, "noise\n", "a traceback\nKilled\n")
        found = {"finished": True, "step_s": 0.5 if settings["model"] == "ours" else 1.25}
        return subprocess.CompletedProcess(command, 0, f"noise\nROW {json.dumps(found)}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    rows = list(memory_caps.rows(options("--caps", "6,8,32", "--steps", "3", "--timeout", "7")))
    assert [(row["gib"], row["mode"], row["model"]) for row in rows] == [
        (gib, mode, model) for gib in (6, 8, 32) for mode in ("dynamic", "static") for model in ("ours", "bf16")
    ]
    assert all(settings["steps"] == 3 and settings["size"] == 1024 for settings in started)
    assert rows[1]["failed"] == "not finished after 7 s" and not rows[1]["finished"]
    assert rows[7]["failed"] == "status -9: Killed"
    # The bf16 model fits a card of 32 GiB: nothing to compare.
    assert [row.get("times_ours") for row in rows] == [None] * 5 + [2.5] + [None] * 6


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if find_comfyui() is None:
        pytest.skip("no ComfyUI")
    asked = []

    def script_rows(command: list[str]):
        asked.append(command)
        yield {"gib": 8.0, "mode": "static", "label": "this pack", "finished": True, "step_s": 0.5}

    monkeypatch.setenv("COMFYUI_PATH", str(find_comfyui()))
    monkeypatch.setattr(bench_memory, "script_rows", script_rows)
    assert main(["bench", "memory", "--caps", "8", "--modes", "static", "--steps", "5", "--profile", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["gpu"] == "a GPU" and row["step_s"] == 0.5
    (command,) = asked
    assert {"--caps": "8", "--modes": "static", "--steps": "5"}.items() <= dict(itertools.pairwise(command)).items()
    assert "--profile" in command and Path(command[1]).is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--caps", "6,large"], "--caps 6,large"),
        (["--modes", "lowvram"], "--modes lowvram is not known; choose from dynamic,static"),
        (["--models", "fp8"], "--models fp8 is not known"),
        (["--steps", "1"], "--steps 1"),
        (["--switches", "7"], "--switches 7"),
        (["--static"], "--static is for kernels; bench memory measures"),
    ],
)
def test_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "memory", *words]) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "memory"]) == 2
    assert "there is no NVIDIA GPU here" in capsys.readouterr().err


def test_how_much_of_copying_is_hidden() -> None:
    copies = memory_worker.merged([(5, 9), (0, 4), (3, 5), (20, 22)])
    kernels = memory_worker.merged([(2, 6), (8, 30)])
    assert copies == [(0, 9), (20, 22)]
    assert memory_worker.length(copies) == 11
    assert memory_worker.overlap(copies, kernels) == (6 - 2) + (9 - 8) + 2
    assert memory_worker.overlap(copies, []) == 0


def test_growth_is_seen_under_noise() -> None:
    """Two checkpoints of different sizes, a process that is still warming up, noise, and 3 MB a switch more or not."""
    warming = [100, 220, 160, 250, 180, 260]
    noise = [4, 0, 7, 1, 0, 9, 2, 0, 5, 0, 3, 1, 8, 0]
    steady = warming + [200 + 70 * (i % 2) + noise[i] for i in range(14)]
    assert abs(model_switches.growth(steady)) < 5
    growing = warming + [200 + 70 * (i % 2) + noise[i] + 3 * i for i in range(14)]
    assert model_switches.growth(growing) > 15
