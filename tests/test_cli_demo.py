"""The ``demo`` command: what it queues, what it refuses, and one real run in a ComfyUI that belongs to somebody."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from svdq.cli import RESTARTED, UserError, demo
from svdq.cli.comfy_server import install_pack
from svdq.cli.environment import comfyui_path

ROOT = Path(__file__).resolve().parent.parent

# What a server says about the nodes of the shipped workflows, as far as the conversion reads it.
TEXT_ENCODERS = [
    "t5xxl_fp16.safetensors",
    "sub/t5xxl_fp8_e4m3fn.safetensors",
    "clip_g.safetensors",
    "clip_l.safetensors",
]
OBJECT_INFO: dict[str, Any] = {
    "SVDQFluxLoader": {
        "input": {
            "required": {"model_name": ["COMBO"], "precision": ["COMBO"]},
            "optional": {"weights": ["COMBO"]},
        }
    },
    "SVDQDemoPrompt": {"input": {"required": {"model": ["MODEL"], "text": ["STRING"]}}},
    "SVDQFluxSampler": {
        "input": {
            "required": {
                "seed": ["INT", {"control_after_generate": True}],
                "steps": ["INT"],
                "guidance": ["FLOAT"],
                "sampler_name": ["COMBO"],
                "scheduler": ["COMBO"],
                "denoise": ["FLOAT"],
                "cfg": ["FLOAT"],
            }
        }
    },
    "DualCLIPLoader": {
        "input": {
            "required": {"clip_name1": [TEXT_ENCODERS], "clip_name2": [TEXT_ENCODERS], "type": [["flux"]]},
            "optional": {"device": [["default"]]},
        }
    },
    "CLIPTextEncode": {"input": {"required": {"text": ["STRING"], "clip": ["CLIP"]}}},
    "VAELoader": {"input": {"required": {"vae_name": [["taesd.safetensors", "flux/ae.safetensors"]]}}},
    "EmptySD3LatentImage": {"input": {"required": {"width": ["INT"], "height": ["INT"], "batch_size": ["INT"]}}},
    "VAEDecode": {"input": {"required": {}}},
    "SaveImage": {"input": {"required": {"filename_prefix": ["STRING"]}}},
}


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(argv)


def job(
    *argv: str, monkeypatch: pytest.MonkeyPatch, models: Path, width: int = 4096, guidance: bool = True
) -> demo.Job:
    """A job for a model file of which only the config matters here."""
    config = SimpleNamespace(context_in_dim=width, guidance_embed=guidance)
    monkeypatch.setattr(demo, "_open", lambda path: SimpleNamespace(config=config))
    model = models.parent / "their model.safetensors"
    model.touch()
    made = demo.Job(arguments("--model", str(model), *argv), models)
    made.prepare_models()
    return made


def inputs(prompt: dict[str, Any], kind: str) -> dict[str, Any]:
    (found,) = (node["inputs"] for node in prompt.values() if node["class_type"] == kind)
    return found


def test_a_real_model_gets_real_encoders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = job("--prompt", "a fox", "--size", "512x768", "--seed", "7", monkeypatch=monkeypatch, models=tmp_path / "m")
    prompt = made.prompt(OBJECT_INFO)
    assert inputs(prompt, "SVDQFluxLoader")["model_name"] == "given/their model.safetensors"
    assert inputs(prompt, "DualCLIPLoader")["clip_name1"] == "clip_l.safetensors"
    assert inputs(prompt, "DualCLIPLoader")["clip_name2"] == "sub/t5xxl_fp8_e4m3fn.safetensors"
    assert inputs(prompt, "VAELoader")["vae_name"] == "flux/ae.safetensors"
    assert inputs(prompt, "CLIPTextEncode")["text"] == "a fox"
    latent = inputs(prompt, "EmptySD3LatentImage")
    assert (latent["width"], latent["height"]) == (512, 768)
    sampler = inputs(prompt, "SVDQFluxSampler")
    assert (sampler["seed"], sampler["steps"]) == (7, 20)
    assert made.remark() is None
    # Linked, not copied.
    assert (tmp_path / "m" / "diffusion_models" / "given" / "their model.safetensors").is_symlink()


def test_given_files_are_linked_under_a_name_that_comfyui_lists(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "3f2a").write_text("content")
    (tmp_path / "legacy folder").mkdir()
    for path, name in ("blobs/3f2a", "given/3f2a.safetensors"), ("legacy folder", "given/legacy folder"):
        assert demo._link(tmp_path / path, tmp_path / "models") == name
        assert (tmp_path / "models" / name).resolve() == tmp_path / path
    assert len(list((tmp_path / "models" / "given").iterdir())) == 1
    assert (tmp_path / "blobs" / "3f2a").read_text() == "content"


def test_schnell_takes_four_steps_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for options, steps in ((), 4), (("--demo-prompt",), 4), (("--steps", "2"), 2):
        made = job(*options, monkeypatch=monkeypatch, models=tmp_path / "m", guidance=False)
        assert inputs(made.prompt(OBJECT_INFO), "SVDQFluxSampler")["steps"] == steps


def test_a_test_model_gets_stand_ins_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = job("--prompt", "a fox", monkeypatch=monkeypatch, models=tmp_path / "m", width=256)
    prompt = made.prompt(OBJECT_INFO)
    assert inputs(prompt, "SVDQDemoPrompt")["text"] == "a fox"
    assert (tmp_path / "m" / "vae" / inputs(prompt, "VAELoader")["vae_name"]).is_file()
    assert "256, not FLUX.1's 4096" in made.remark()


@pytest.mark.parametrize("make, match", [(os.mkdir, "a folder"), (getattr(os, "mkfifo", os.mkdir), "; name a file")])
def test_a_picture_replaces_files_only(make: Any, match: str, tmp_path: Path) -> None:
    make(tmp_path / "it")
    with pytest.raises(UserError, match=match):
        demo._check_paths(SimpleNamespace(text_encoders=None, vae=None, output=tmp_path / "it"))


def test_missing_encoders_are_named_with_where_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    info = {**OBJECT_INFO, "DualCLIPLoader": {"input": {"required": {"clip_name1": [[]], "clip_name2": [[]]}}}}
    info["DualCLIPLoader"]["input"]["required"] |= {"type": [["flux"]]}
    info["DualCLIPLoader"]["input"]["optional"] = {"device": [["default"]]}
    made = job(monkeypatch=monkeypatch, models=tmp_path / "m")
    with pytest.raises(UserError) as error:
        made.prompt(info)
    message = str(error.value)
    for part in (
        "clip_l",
        "t5xxl",
        "ae.safetensors",
        "https://",
        str(tmp_path / "m" / "text_encoders"),
        "--demo-prompt",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "argv", [["--size", "100x100"], ["--size", "1024"], ["--size", "0x16"], ["--seed", "-1"], ["--steps", "many"]]
)
def test_impossible_numbers_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(*argv)


# ---------------------------------------------------------------------------------- in a real ComfyUI, as a person


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of this clone under another name, without a ``.venv``."""
    path = tmp_path / "ComfyUI-svdq copy"
    install_pack(ROOT, path)
    return path


@pytest.fixture
def comfyui() -> Path:
    """A ComfyUI that is treated as the person's own."""
    path = comfyui_path()
    if not (path / "main.py").is_file():
        pytest.skip("no ComfyUI: run `python3 . test`, or set COMFYUI_PATH")
    return path


def start_demo(clone: Path, comfyui: Path, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(clone), "demo", "--cpu", *argv],
        env=os.environ | {"COMFYUI_PATH": str(comfyui), RESTARTED: str(time.time())},
        cwd=clone.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        # Whoever runs the tests in the background may have SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def servers_of(clone: Path) -> list[str]:
    """Command lines of the processes that serve this clone's demo."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "main.py" in command and str(clone) in command:
            found.append(command)
    return found


def listing(folder: Path) -> dict[str, int]:
    """Every file with its time. Bytecode is left out: another server of these tests may write some meanwhile."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in str(path)}


@pytest.mark.server
@pytest.mark.slow
def test_demo_makes_a_picture_and_leaves_no_trace_in_their_comfyui(clone: Path, comfyui: Path) -> None:
    before = listing(comfyui)
    started = start_demo(clone, comfyui, "--steps", "2", "--size", "64x96", "--output", "sub folder/made.png")
    out, err = started.communicate(timeout=180)
    assert started.returncode == 0, out + err
    picture = clone.parent / "sub folder" / "made.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(picture.read_bytes()[16:20], "big") == 64
    for part in (f"Picture    {picture}", "rank 16", "computes in 16bit", "start of ComfyUI", "first step", "in all"):
        assert part in out
    assert not (clone / ".venv").exists()
    assert listing(comfyui) == before
    assert not servers_of(clone)


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_an_interrupted_demo_takes_comfyui_with_it(clone: Path, comfyui: Path) -> None:
    started = start_demo(clone, comfyui, "--steps", "10000")
    for line in started.stdout:
        if "Sampler" in line:
            break
    assert servers_of(clone)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130, out + err
    assert err == "interrupted; run the same command again to go on\n"
    assert not servers_of(clone)
    assert not (clone / "out" / "demo.png").exists()


def test_a_bad_file_is_one_line(clone: Path, comfyui: Path, tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><title>Sign in</title>" * 100)
    for name in ("page.safetensors", "absent.safetensors"):
        started = start_demo(clone, comfyui, "--model", str(tmp_path / name))
        out, err = started.communicate(timeout=60)
        assert (started.returncode, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert name in err
