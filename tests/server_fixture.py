"""Fixtures: one real ComfyUI server for the whole test session, with this pack installed and small stand-in models.

The server sees, in its model folders:

* ``svdq-int4_r16-demo-flux.safetensors``, ``svdq-demo-vae.safetensors``: what the demo workflow names;
* tiny models and the same VAE under the names that the other workflows ask for, so that these validate;
* empty text encoders, which validate and must never be loaded;
* the demo model once more as a legacy folder, and in a folder of extra_model_paths.yaml;
* a LoRA for it;
* broken and wrong files, see ``BAD_MODELS``.

It also has the node of server_nodes.py.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from svdq.cli.comfy_client import ComfyClient
from svdq.cli.comfy_server import ComfyServer
from svdq.cli.dequantize import dequantize
from svdq.cli.environment import comfyui_path
from svdq.cli.synth import synth
from svdq.loaders.demo_assets import write_demo_vae
from svdq.loaders.legacy import BLOCKS_FILE, OUTER_FILE

DEMO_MODEL = "svdq-int4_r16-demo-flux.safetensors"
DEMO_VAE = "svdq-demo-vae.safetensors"
EXTRA_MODEL = "svdq-in-another-folder.safetensors"
LEGACY_MODEL = "svdq-legacy-folder"
LORA = "test-lora.safetensors"
# name -> variant of the tiny model behind it
STAND_IN_MODELS = {
    "svdq-int4_r32-flux.1-dev.safetensors": "dev",
    "svdq-int4_r32-flux.1-schnell.safetensors": "schnell",
    "svdq-int4_r32-flux.1-kontext-dev.safetensors": "kontext",
    "svdq-int4_r32-flux.1-fill-dev.safetensors": "fill",
}
STAND_IN_ENCODERS = ("clip_l.safetensors", "t5xxl_fp8_e4m3fn.safetensors")
STAND_IN_VAE = "ae.safetensors"

# name in the dropdown -> what the error has to say besides the name
BAD_MODELS = {
    "bad-truncated.safetensors": "Download the file again",
    "bad-web-page.safetensors": "a web page",
    "bad-vae.safetensors": "a VAE",
    "bad-lora.safetensors": "a LoRA",
    "bad-16-bit.safetensors": "a FLUX model that is not SVDQuant INT4",
    "bad-legacy-folder": OUTER_FILE,
}


@dataclass(frozen=True)
class RunningServer:
    """The server and what tests need around it."""

    server: ComfyServer
    demo_model: Path

    @property
    def client(self) -> ComfyClient:
        return self.server.client

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def models(self) -> Path:
        return self.server.base_directory / "models"

    @property
    def pack_name(self) -> str:
        return self.server.pack_directory.name

    def loads(self) -> int:
        """How many checkpoints the pack has loaded so far, by its log lines."""
        return self.server.log_text().count("SVDQ FLUX: ")

    def wait_until_idle(self, timeout: float = 60.0) -> None:
        """Return when the queue is empty and nothing runs."""
        deadline = time.monotonic() + timeout
        while any(self.client.get_json("/queue").values()):
            assert time.monotonic() < deadline, f"ComfyUI is still busy after {timeout} s\n{self.server.log_tail()}"
            time.sleep(0.05)


def unavailable(reason: str) -> None:
    """Skip the test, or fail it where everything has to be there (CI=true)."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def comfy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The running server; starts on first use, on the CPU."""
    with running_server(tmp_path_factory, cpu=True, options=["--preview-method", "latent2rgb"]) as server:
        yield server


@contextmanager
def running_server(
    tmp_path_factory: pytest.TempPathFactory, cpu: bool, options: Sequence[str]
) -> Iterator[RunningServer]:
    """A server as ``comfy_server`` is one, on a GPU (``cpu`` False) or with other options."""
    if not (comfyui_path() / "main.py").is_file():
        unavailable("no ComfyUI: run `python3 . test`, or set COMFYUI_PATH")
    base = tmp_path_factory.mktemp("comfyui")
    elsewhere = tmp_path_factory.mktemp("more-models")
    demo_model = _write_models(base / "models")
    shutil.copyfile(demo_model, elsewhere / EXTRA_MODEL)
    for folder in ("input", "custom_nodes"):
        (base / folder).mkdir()
    Image.linear_gradient("L").convert("RGB").save(base / "input" / "example.png")
    shutil.copyfile(Path(__file__).with_name("server_nodes.py"), base / "custom_nodes" / "server_nodes.py")

    server = ComfyServer(
        base,
        cpu=cpu,
        pack_name="svdq-flux-under-test",
        extra_arguments=options,
        model_folders={"diffusion_models": [elsewhere]},
    )
    with server:
        yield RunningServer(server, demo_model)


def _write_models(models: Path) -> Path:
    diffusion, vae, encoders = (models / kind for kind in ("diffusion_models", "vae", "text_encoders"))
    for folder in (diffusion, vae, encoders):
        folder.mkdir(parents=True)

    write_demo_vae(vae / DEMO_VAE)
    shutil.copyfile(vae / DEMO_VAE, vae / STAND_IN_VAE)
    synth(diffusion / DEMO_MODEL, scale="tiny", seed=0, rank=16)
    synth(diffusion / LEGACY_MODEL, scale="tiny", seed=0, rank=16, container="folder")
    for name, variant in STAND_IN_MODELS.items():
        synth(diffusion / name, variant, scale="tiny", seed=0)
    _write_lora(models / "loras" / LORA, hidden_size=256)
    for name in STAND_IN_ENCODERS:
        (encoders / name).touch()

    content = (diffusion / DEMO_MODEL).read_bytes()
    (diffusion / "bad-truncated.safetensors").write_bytes(content[: len(content) // 2])
    (diffusion / "bad-web-page.safetensors").write_bytes(b"<!DOCTYPE html><title>Sign in</title>" * 100)
    shutil.copyfile(vae / DEMO_VAE, diffusion / "bad-vae.safetensors")
    shutil.copyfile(models / "loras" / LORA, diffusion / "bad-lora.safetensors")
    dequantize(diffusion / DEMO_MODEL, diffusion / "bad-16-bit.safetensors", dtype="bf16")
    (diffusion / "bad-legacy-folder").mkdir()
    shutil.copyfile(diffusion / DEMO_MODEL, diffusion / "bad-legacy-folder" / BLOCKS_FILE)
    return diffusion / DEMO_MODEL


def _write_lora(path: Path, hidden_size: int, rank: int = 4) -> None:
    """A LoRA that changes the picture visibly: one plain layer, and the q of a fused qkv."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "diffusion_model.single_blocks.0.linear2": 5 * hidden_size,
        "transformer.transformer_blocks.0.attn.to_q": hidden_size,
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, size in inputs.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, size, generator=generator) / rank
        tensors[f"{name}.lora_B.weight"] = torch.randn(hidden_size, rank, generator=generator) / 10
    path.parent.mkdir(parents=True)
    save_file(tensors, path)


def demo_prompt(**changes: dict[str, Any]) -> dict[str, Any]:
    """The demo as an API prompt, small and quick. ``changes``: node name -> inputs to set."""
    prompt: dict[str, Any] = {
        "loader": {"class_type": "SVDQFluxLoader", "inputs": {"model_name": DEMO_MODEL, "precision": "auto"}},
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": DEMO_VAE}},
        "latent": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 96, "height": 64, "batch_size": 1}},
        "text": {"class_type": "SVDQDemoPrompt", "inputs": {"model": ["loader", 0], "text": "a test"}},
        "sampler": {
            "class_type": "SVDQFluxSampler",
            "inputs": {
                "model": ["loader", 0],
                "positive": ["text", 0],
                "latent_image": ["latent", 0],
                "seed": 1,
                "steps": 3,
                "guidance": 3.5,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
                "cfg": 1.0,
            },
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["vae", 0]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "test"}},
    }
    for node, inputs in changes.items():
        prompt[node]["inputs"] |= inputs
    return prompt
