"""``bench flux`` on a CPU: the rows of a tiny model, and what is refused."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import find_comfyui

from svdq.cli import RESTARTED, main
from svdq.cli.synth import synth


@pytest.fixture
def model(comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(RESTARTED, "1")
    monkeypatch.setenv("COMFYUI_PATH", str(find_comfyui()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    path = tmp_path / "dev.safetensors"
    synth(path, variant="dev", scale="tiny", seed=3)
    return path


@pytest.mark.comfy
@pytest.mark.slow
def test_rows_of_a_tiny_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers = ["bf16", "ours", "ours-lora", "fp8"]
    command = ["bench", "flux", "--model", str(model), "--sizes", "64,32", "--peers", ",".join(peers), "--json"]
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["peer"], row["size"]) for row in rows] == [(peer, size) for peer in peers for size in (64, 32)]
    for row in rows:
        assert "failed" not in row, row
        assert row["run"] == "cpu" and 0 < row["host_ms"] <= row["wall_ms"] and row["same_bits"]
    for row in rows:
        measured = {"lora_ms", "lora_percent", "lora_loop_percent", "add_s", "strength_s", "remove_s"} <= row.keys()
        assert measured == (row["peer"] == "ours-lora")
    distance = {row["peer"]: row["distance"] for row in rows if row["size"] == 64 and row["peer"] != "bf16"}
    # Without a GPU ours is the dequantized model itself, in float32 instead of bf16; fp8 has another error.
    assert 0 < distance["ours"] < 0.02 < distance["fp8"]


@pytest.mark.comfy
def test_starts_on_a_gpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes for the first step, with Triton's cache empty and as the first one left it, at one size."""
    from svdq.cli import bench_flux

    started = []

    def rows(command: list[str], environ: dict[str, str]):
        asked = {name: command[command.index(f"--{name}") + 1] for name in ("peers", "sizes")}
        started.append((*asked.values(), command[-1], environ["TRITON_CACHE_DIR"]))
        return iter([{"label": "this pack"}])

    monkeypatch.setattr(bench_flux, "has_accelerator", lambda: True)
    monkeypatch.setattr(bench_flux, "script_rows", rows)
    args = argparse.Namespace(model=model, sizes="64,32", batch=1, peers="bf16,ours,fp8")
    found = [row["run"] for row in bench_flux.rows(args, lambda text: None)]
    assert found == ["cold", "warm", "static", "dynamic"]
    assert [start[:3] for start in started] == [
        ("ours", "64", "--disable-dynamic-vram"),
        ("ours", "64", "--disable-dynamic-vram"),
        ("bf16,ours,fp8", "64,32", "--disable-dynamic-vram"),
        ("bf16,ours", "64,32", "--enable-dynamic-vram"),
    ]
    assert len({start[3] for start in started}) == 1 and not Path(started[0][3]).exists()


@pytest.mark.comfy
@pytest.mark.slow
def test_a_peer_that_cannot_run_says_why(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    assert main(["bench", "flux", "--model", str(model), "--sizes", "32", "--peers", "nf4,ours"]) == 0
    header, failed, ours = capsys.readouterr().out.splitlines()
    assert "bitsandbytes is not installed" in failed and "this pack" in ours
    assert header.split()[:3] == ["run", "label", "size"]


def test_the_cudnn_peer_attends_as_comfyui_does(comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the kernel, which a CPU does not have."""
    import comfy.ldm.modules.attention as attention
    from torch.nn.attention import SDPBackend

    from svdq.benchmarks import flux_peers

    monkeypatch.setattr(SDPBackend, "CUDNN_ATTENTION", SDPBackend.MATH)
    q, k, v = torch.randn(3, 2, 4, 10, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(10, 10) > 0.3
    for of_mask in (None, mask):
        arguments, options = (q, k, v, 4), {"mask": of_mask, "skip_reshape": True, "transformer_options": {}}
        expected = attention.attention_pytorch(*arguments, **options)
        torch.testing.assert_close(flux_peers._cudnn_attention(None, *arguments, **options), expected)
    with pytest.raises(ValueError, match="heads apart"):
        flux_peers._cudnn_attention(None, q, k, v, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "absent.safetensors"], "absent.safetensors does not exist"),
        (["--model", "{model}", "--sizes", "65"], "--sizes 65"),
        (["--model", "{model}", "--peers", "gguf"], "--peers gguf is not known"),
        (["--model", "{model}", "--static"], "--static is for kernels"),
        ([], "name a small one with --model"),
    ],
)
@pytest.mark.comfy
def test_refused(model: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "flux", *(option.format(model=model) for option in options)]) == 2
    assert message in capsys.readouterr().err
