"""Runs a soak's plan on a ComfyUI server, over its HTTP API."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

from soak_judge import LOST, Outcome, Sample, judge
from soak_plan import Run, node, plan

from svdq.cli.comfy_client import ComfyError, ConnectionLost, Event, ExecutionFailed, ExecutionInterrupted
from svdq.cli.comfy_server import ComfyServer
from svdq.cli.console import StatusLine
from svdq.kernels import backend_for, explain

MB = 1e6
TIMEOUT = 300.0  # seconds for one prompt, kernels compiled
SAMPLES = 40  # of the memory
LORA_COMPLAINTS = ("lora key not loaded", "NOT LOADED", "ERROR lora")  # in ComfyUI's log


class Soak:
    """Queues runs on one server."""

    def __init__(self, server: ComfyServer) -> None:
        self._server, self._client = server, server.client
        self._read = 0  # bytes of the log
        self._prompts = 0

    def device(self) -> dict[str, Any]:
        """What ComfyUI says of its first one."""
        return self._client.system_stats()["devices"][0]

    def precisions(self) -> tuple[list[str], list[str]]:
        """Those that the server's device can and cannot compute; only ``auto`` where SVDQ_BACKEND decides."""
        device = self.device()["type"]
        if backend_for(device).reason.startswith("forced"):
            return ["auto"], []
        can = {backend.precision: backend.available for backend in explain(device)}
        return ["auto", *(name for name in can if can[name])], [name for name in can if not can[name]]

    def run(self, run: Run) -> Outcome:
        """Queue it, wait for it, and do to the server meanwhile what it says."""
        try:
            return self._run(run)
        except (ComfyError, OSError) as error:
            return self.lost(run, error)

    def lost(self, run: Run, error: Exception) -> Outcome:
        """That the server does not answer any more, and why."""
        if isinstance(error, ConnectionLost) or not self._server.is_running():
            return Outcome(run, "crashed", message=self._server.exit_reason())
        return Outcome(run, "stuck", message=str(error))

    def _run(self, run: Run) -> Outcome:
        self._log()
        cached: list[str] = []
        pending = run.stop_at is not None, run.free is not None and run.free_during
        if run.free is not None and not run.free_during:
            self._client.post_json("/free", run.free)

        def watch(event: Event) -> None:
            nonlocal pending
            stop, free = pending
            step = event.data["value"] if event.type == "progress" and event.data["node"] == "sampler" else 0
            if event.type == "execution_cached":
                cached.extend(event.data["nodes"])
            if free and step:
                self._client.post_json("/free", run.free)
                free = False
            reached = event.type == "executing" and event.data["node"] == run.stop_at
            # A node whose result is cached is never executed: the first step will do, too.
            if stop and (reached or step >= (run.stop_at if isinstance(run.stop_at, int) else 1)):
                self._client.interrupt()
                stop = False
            pending = stop, free

        self._prompts += 1
        prompt = run.changed.prompt(run.weights, self._prompts)
        try:
            entry = self._client.run(prompt, on_event=watch, timeout=TIMEOUT)
            found = entry["outputs"]["record"]
            outcome = Outcome(run, "finished", tuple(found["sha256"]), all(found["finite"]), "sampler" not in cached)
        except ExecutionInterrupted:
            outcome = Outcome(run, "interrupted")
        except ExecutionFailed as error:
            message = str(error.details.get("exception_message")).strip()
            outcome = Outcome(run, "refused", where=str(error.details.get("node_type")), message=message)
        self._client.post_json("/history", {"clear": True})  # it would grow
        complaints = [line for line in self._log() if any(words in line for words in LORA_COMPLAINTS)]
        return replace(outcome, complaints=tuple(complaints))

    def sample(self, number: int) -> Sample:
        """Let ComfyUI forget everything, and look."""
        self._client.free()
        for _ in range(2):  # a prompt that comes before the server's worker has looked at the request goes first
            self._prompts += 1
            entry = self._client.run({"memory": node("SoakMemory", number=self._prompts)}, timeout=TIMEOUT)
        self._client.post_json("/history", {"clear": True})
        found = entry["outputs"]["memory"]
        device = self.device()
        (ram,), (tensors,) = found["ram"], found["tensors"]
        on_gpu = device["type"] != "cpu"
        return Sample(
            number,
            None if ram is None else round(ram / MB, 1),
            round((device["vram_total"] - device["vram_free"]) / MB, 1) if on_gpu else None,
            round((device["torch_vram_total"] - device["torch_vram_free"]) / MB, 1) if on_gpu else None,
            tensors,
        )

    def _log(self) -> list[str]:
        """What the server has logged since the last call."""
        with self._server.log.open("rb") as log:
            log.seek(self._read)
            text = log.read()
        self._read += len(text)
        return text.decode("utf-8", errors="replace").splitlines()


def soak(server: ComfyServer, runs: int, seed: int, status: StatusLine) -> tuple[dict[str, Any], list[str]]:
    """(row, what went wrong) of ``runs`` runs on a running server that has write_models' files and soak_nodes.py."""
    start = time.monotonic()
    work = Soak(server)
    device = work.device()["name"]
    planned = plan(runs, seed, *work.precisions())
    first = work.run(next(run for run in planned if run.kind == "plain"))
    outcomes: list[Outcome] = []
    samples: list[Sample] = []
    every = max(3, runs // SAMPLES)
    for number, run in enumerate(planned):
        outcomes.append(work.run(run))
        status.update(f"run {number + 1} of {runs}: {run.kind}, {outcomes[-1].ended}")
        if outcomes[-1].ended not in LOST and number % every == every - 1:
            try:
                samples.append(work.sample(number))
            except (ComfyError, OSError) as error:
                outcomes[-1] = work.lost(run, error)
        if outcomes[-1].ended in LOST:
            break
    status.clear()
    row, problems = judge(outcomes, samples)
    later = next((one.hashes for one in outcomes if one.run == first.run and one.ended == "finished"), None)
    row |= {"first_same": later and later == first.hashes, "seconds": round(time.monotonic() - start, 1)}
    refusals = {one.run.kind: one.message for one in outcomes if one.ended == "refused"}
    return row | {"device": device, "refusals": refusals, "samples": [asdict(one) for one in samples]}, problems
