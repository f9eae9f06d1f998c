"""A prompt that runs out of memory in the middle of a step: ComfyUI says so, and the next one works."""

from __future__ import annotations

import numpy as np
import pytest
from server_fixture import RunningServer, demo_prompt, running_server
from test_server import cached_nodes, picture

from svdq.cli.comfy_client import Event, ExecutionFailed

pytestmark = pytest.mark.server

SIZE = 512  # pixels; on a GPU a step has to ask for more memory than it finds in what torch already has


def sampled(server: RunningServer, seed: int, model: str = "loader") -> np.ndarray:
    prompt = demo_prompt(
        sampler={"seed": seed, "model": [model, 0]}, latent={"width": SIZE, "height": SIZE, "batch_size": 1}
    )
    if model != "loader":
        prompt[model] = {"class_type": "TestOutOfMemory", "inputs": {"model": ["loader", 0]}}
    events: list[Event] = []
    image = picture(server, prompt, events)
    assert "sampler" not in cached_nodes(events), "nothing was computed"
    return image


def check(server: RunningServer) -> None:
    before = sampled(server, seed=41)
    server.client.free()  # so that the same prompt runs again
    sampled(server, seed=42)
    unloads = server.server.log_text().count("Got an OOM, unloading all loaded models.")
    with pytest.raises(ExecutionFailed, match="This error means you ran out of memory on your GPU") as failed:
        sampled(server, seed=41, model="short of memory")
    assert failed.value.details["node_type"] == "SVDQFluxSampler"
    assert failed.value.details["exception_type"] == "torch.OutOfMemoryError"
    assert server.server.log_text().count("Got an OOM, unloading all loaded models.") == unloads + 1
    assert np.array_equal(sampled(server, seed=41), before)


def test_a_step_out_of_memory(comfy_server: RunningServer) -> None:
    check(comfy_server)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--enable-dynamic-vram", "--disable-dynamic-vram", "--novram"])
def test_a_step_out_of_memory_on_a_gpu(mode: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_server(tmp_path_factory, cpu=False, options=[mode]) as server:
        check(server)
