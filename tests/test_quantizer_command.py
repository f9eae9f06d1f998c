"""``quantize`` with calibration: the command line, the prompts that it takes, and one run through a real ComfyUI."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, find_comfyui
from files import changed, read_all, write_raw
from quantizer_models import REPORTED, prompts, save_prompts, save_source
from safetensors.torch import load_file, save_file

from svdq import cli
from svdq.cli import UserError, quantize_calibrated
from svdq.cli import quantize as command
from svdq.cli.comfy_client import Event
from svdq.loaders import CheckpointError, open_checkpoint
from svdq.quantizer.prompts import BUILTIN_PROMPTS, METADATA, Prompt, read_lines, read_prompts, write_prompts

OPTIONS = ("--rank", "16", "--iterations", "1", "--size", "64x64", "--steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A 16-bit model and encoded prompts for it."""
    folder = tmp_path_factory.mktemp("files")
    return save_source(folder / "my model.safetensors"), save_prompts(folder / "prompts.safetensors")


def arguments(*argv: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in argv])


# ---- files of prompts


def test_encoded_prompts_come_back(tmp_path: Path) -> None:
    path = tmp_path / "prompts.safetensors"
    given = [Prompt(p.context.to(dtype), p.pooled.to(dtype), p.guidance) for p, dtype in
             zip(prompts(3), (torch.bfloat16, torch.float32, torch.float16), strict=True)]  # fmt: skip
    write_prompts(path, given)
    found = read_prompts(path)
    assert [p.guidance for p in found] == [None, 3.5, 3.5]
    for one, other in zip(found, given, strict=True):
        assert torch.equal(one.context, other.context) and torch.equal(one.pooled, other.pooled)
    with pytest.raises(CheckpointError, match="one that exists"):
        write_prompts(path, given)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t, m: m.clear(), f"metadata: found no {METADATA}"),
        (lambda t, m: m.update({METADATA: "{"}), "svdq.conditioning: found {"),
        (lambda t, m: m.update({METADATA: '{"version": 2, "guidance": [1, 1, 1]}'}), "version 2"),
        (lambda t, m: m.update({METADATA: '{"version": 1, "guidance": ["a"]}'}), "guidance"),
        (lambda t, m: m.update({METADATA: '{"version": 1, "guidance": []}'}), "prompts: found none"),
        (lambda t, m: t.pop("1.pooled"), r"1\.pooled: found no such key"),
        (lambda t, m: t.update({"0.context": torch.zeros(20)}), r"0\.context: found F32 \[20\]"),
        (lambda t, m: t.update({"0.context": torch.zeros(0, 64)}), r"0\.context: found F32 \[0, 64\]"),
        (lambda t, m: t.update({"0.pooled": torch.zeros(32, dtype=torch.int8)}), r"0\.pooled: found I8"),
        (lambda t, m: t.update({"2.pooled": torch.full((32,), torch.inf)}), r"2\.pooled: found values NaN or infinite"),
    ],
)
def test_bad_files_of_encoded_prompts(change: Any, match: str, tmp_path: Path) -> None:
    path = changed(save_prompts(tmp_path / "prompts.safetensors"), change)
    with pytest.raises(CheckpointError, match=match) as error:
        read_prompts(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))


def test_files_that_are_no_encoded_prompts(tmp_path: Path) -> None:
    wrong = ((b"a house\n", "header size"), (b"", "0 bytes"), (b"PK\x03\x04abcdefgh", "pickle"))
    for content, match in wrong:
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            read_prompts(tmp_path / "x")
    with pytest.raises(CheckpointError, match="invalid JSON"):
        read_prompts(write_raw(tmp_path / "y", b'{"a": "\xff\xfe"}'))
    with pytest.raises(CheckpointError, match="readable file"):
        read_prompts(tmp_path / "none")


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf  a house \r\n\r\nein Haus \xc3\xbc\n")
    assert read_lines(path) == ["a house", "ein Haus ü"]
    for content, match in (
        (b"", "prompts: found none"),
        (b" \n\n", "prompts: found none"),
        ("caf\xe9".encode("latin-1"), "text: found byte 0xe9 at position 3, expected UTF-8. Save the file as UTF-8"),
        ("a".encode("utf-16"), "expected UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            read_lines(path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_lines(tmp_path / "none.txt")


# ---- the command line


def test_mistakes_are_found_before_comfyui_starts(files: tuple[Path, Path], tmp_path: Path) -> None:
    source, encoded = files
    out = tmp_path / "out.safetensors"

    def refused(kind: type[Exception], match: str, *argv: object) -> None:
        with pytest.raises(kind, match=match):
            quantize_calibrated.job_of(arguments(*argv))

    text = tmp_path / "latin.txt"
    text.write_bytes(b"caf\xe9")
    refused(CheckpointError, "expected UTF-8", source, out, "--prompts", text)
    refused(CheckpointError, "svdq.conditioning", source, out, "--conditioning", source)
    refused(CheckpointError, "a FLUX.1 model", encoded, out, "--conditioning", encoded)
    refused(UserError, "is a folder", tmp_path, out, "--conditioning", encoded)
    refused(UserError, "name a .safetensors file", source, tmp_path / "out", "--conditioning", encoded)
    refused(CheckpointError, "one that exists", source, text.rename(out), "--conditioning", encoded)
    out.rename(text)
    refused(CheckpointError, "Create it first", source, tmp_path / "no" / out.name, "--conditioning", encoded)
    refused(UserError, "no such folder", source, out, "--conditioning", encoded, "--text-encoders", tmp_path / "no")
    for argv in (("--size", "100x64"), ("--size", "64"), ("--prompts", text, "--no-calibration")):
        with pytest.raises(SystemExit):
            arguments(source, out, *argv)
    assert sorted(os.listdir(tmp_path)) == ["latin.txt"]


@pytest.mark.parametrize(
    "argv, match",
    [
        (("--rank", "24"), "rank: found 24, expected a multiple of 16 up to 128"),
        (("--rank", "200"), "rank: found 200, expected a multiple of 16 up to 128"),
        (("--keep-16bit", "nothing*"), r"layers to keep in 16 bits: found nothing\*"),
        (("--keep-int8", "*.linear1 *.linear2"), r"layers to keep in int8: found \*.linear1 \*.linear2"),
        (("--rank", "auto", "--target-error", "0.95"), "target error: found 0.95, expected 0 to 0.9"),
        (("--iterations", "64"), "iterations: found 64, expected 1 to 32"),
    ],
)
def test_settings_have_the_same_limits_with_and_without_calibration(
    argv: tuple[str, ...], match: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """and are refused before ComfyUI is started"""
    source, encoded = files
    for how in (("--conditioning", encoded), ("--no-calibration",)):
        with pytest.raises(CheckpointError, match=match) as error:
            command.run(arguments(source, tmp_path / "out.safetensors", *how, *argv))
        assert str(error.value).startswith(str(tmp_path / "out.safetensors"))


@pytest.mark.parametrize(
    "argv, match",
    [
        (("--seed", "-1"), "'-1' is not a number from 0 to 2^64 - 1"),
        (("--seed", str(2**64)), "is not a number from 0 to 2^64 - 1"),
        (("--steps", "0"), "'0' is not a number above 0"),
        (("--iterations", "0"), "'0' is not a number above 0"),
        (("--size", "0000x64"), "'0000x64' is not WIDTHxHEIGHT"),
        (("--size", "64x0"), "'64x0' is not WIDTHxHEIGHT"),
        (("--rank", "abc"), "'abc' is no whole number and not auto"),
        (("--rank", "auto", "--target-error", "0"), "'0' is not a number above 0"),
        (("--rank", "auto", "--target-error", "nan"), "'nan' is not a number above 0"),
        (("--rank", "auto", "--target-error", "much"), "'much' is not a number above 0"),
    ],
)
def test_values_that_are_none(argv: tuple[str, ...], match: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        arguments("source", "out", *argv)
    assert match in capsys.readouterr().err


def test_the_pictures_have_the_limits_of_the_node(files: tuple[Path, Path], tmp_path: Path) -> None:
    for argv, match in (
        (("--size", "16x64"), "--size: 16 is not from 64 to 4096 pixels"),
        (("--size", "64x8192"), "--size: 8192 is not from 64 to 4096 pixels"),
        (("--steps", "101"), "--steps: 101 is more than 100"),
    ):
        with pytest.raises(UserError, match=match):
            quantize_calibrated.job_of(arguments(files[0], tmp_path / "out.safetensors", *argv))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
def test_prefixes_that_comfyui_does_not_read(prefix: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    encoded, out = files[1], tmp_path / "out.safetensors"
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        tensors = {f"{prefix}{name}": tensor.to(dtype) for name, tensor in load_file(files[0]).items()}
        save_file(tensors, tmp_path / "model.safetensors")
        given = arguments(tmp_path / "model.safetensors", out, "--conditioning", encoded)
        if prefix in ("", "model.diffusion_model."):
            assert quantize_calibrated.job_of(given).out == out
        else:
            with pytest.raises(CheckpointError, match=rf"keys: found the prefix {prefix}, .*--no-calibration"):
                quantize_calibrated.job_of(given)


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_what_is_read_is_never_replaced(link: Any, files: tuple[Path, Path], tmp_path: Path) -> None:
    """Not with --force either, nor under another name of the same file"""
    source, encoded, text = (tmp_path / f"{name}.safetensors" for name in ("source", "encoded", "text"))
    shutil.copy(files[0], source)
    shutil.copy(files[1], encoded)
    text.write_text("a house")
    for read in (source, encoded, text):
        out = tmp_path / f"of {read.name}" if link else read
        if link:
            link(read, out)
        prompts = ("--prompts", text) if read == text else ("--conditioning", encoded)
        with pytest.raises(CheckpointError, match="a file that is read") as error:
            quantize_calibrated.job_of(arguments(source, out, *prompts, "--force"))
        assert str(error.value).startswith(str(out))


def test_built_in_prompts(files: tuple[Path, Path], tmp_path: Path) -> None:
    """32 different ones, short and long, are what is used where nothing else is asked for"""
    source, encoded = files
    out = tmp_path / "out.safetensors"
    lines = read_lines(BUILTIN_PROMPTS)
    assert len(set(lines)) == len(lines) == 32
    lengths = sorted(len(line.split()) for line in lines)
    assert lengths[0] < 5 and lengths[-1] > 50
    for argv in ((), ("--prompts", "builtin"), ("--gptq",)):
        assert quantize_calibrated.job_of(arguments(source, out, *argv)).prompts == tuple(lines)
    assert quantize_calibrated.job_of(arguments(source, out, "--conditioning", encoded)).prompts == ()
    own = tmp_path / "builtin"
    own.write_text("mine")
    assert quantize_calibrated.job_of(arguments(source, out, "--prompts", own)).prompts == ("mine",)


def test_prompt_for_texts(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Each text is encoded once, and all of them arrive in their order"""
    text = tmp_path / "prompts.txt"
    text.write_text("\n".join(f"prompt {index}" for index in range(5)))
    job = quantize_calibrated.job_of(arguments(files[0], tmp_path / "a.b.safetensors", "--prompts", text, "--gptq"))
    names = ["t5xxl_fp8_e4m3fn.safetensors", "sub/clip_l.safetensors", "t5xxl_fp16.safetensors"]
    info = {"DualCLIPLoader": {"input": {"required": {f"clip_name{i}": ["COMBO", {"options": names}] for i in (1, 2)}}}}
    prompt = quantize_calibrated.make_prompt(job, "given/m.safetensors", None, info)
    assert prompt["encoders"]["inputs"] == {"clip_name1": names[1], "clip_name2": names[2], "type": "flux"}
    quantize = prompt["quantize"]["inputs"]
    assert quantize["filename"] == "a.b.safetensors" and quantize["gptq"] is True and quantize["width"] == 1024

    def texts(link: list) -> list[str]:
        inputs = prompt[link[0]]["inputs"]
        if "text" in inputs:
            return [inputs["text"]]
        return texts(inputs["conditioning_1"]) + texts(inputs["conditioning_2"])

    assert texts(quantize["conditioning"]) == list(job.prompts)
    assert sum(node["class_type"] == "CLIPTextEncode" for node in prompt.values()) == 5
    info["DualCLIPLoader"]["input"]["required"]["clip_name2"] = ["COMBO", {"options": ["umt5.safetensors"]}]
    with pytest.raises(UserError, match=r"no t5xxl\* found to encode prompts: .*--conditioning"):
        quantize_calibrated.make_prompt(job, "given/m.safetensors", None, info)


def test_time_left() -> None:
    now = [0.0]
    left = command.TimeLeft(lambda: now[0])
    found = []
    for seconds, done in ((0, 20), (1, 21), (10, 30), (100, 60), (800, 60), (810, 10), (850, 50), (900, 100)):
        now[0] = seconds
        found.append(left.text(done, 100).strip())
    assert found == [
        "20%", "21%", "30%, 70 s left", "60%, 2 min left", "60%, 13 min left", "10%",
        "50%, 50 s left", "100%",
    ]  # fmt: skip


def test_display_says_what_the_server_is_at() -> None:
    lines: list[str] = []
    display = quantize_calibrated.Display(lines.append)

    def progress(value: int) -> None:
        display.event(Event("progress", {"node": "quantize", "value": value, "max": 100}))

    display.event(Event("executing", {"node": "model"}))
    display.event(Event("executing", {"node": "quantize"}))
    for text, value in (("watching activations", 50), ("quantizing", 10), ("watching activations for it", 20)):
        display.event(Event("text", {"node": "quantize", "text": text}))
        display.event(Event("text", {"node": "prompts", "text": "of another node"}))
        progress(value)
    assert lines == [
        "loading the model", "calibrating", "watching activations:  50%", "quantizing:  10%",
        "watching activations for it:  20%",
    ]  # fmt: skip


# ---- through a real ComfyUI


def start(files: tuple[Path, Path], out: Path) -> subprocess.Popen[str]:
    source, encoded = files
    argv = [sys.executable, ROOT / "__main__.py", "quantize", source, out, "--conditioning", encoded, *OPTIONS]
    environ = os.environ | {"COMFYUI_PATH": str(find_comfyui()), cli.RESTARTED: str(time.time())}
    # Beside other work, threads that wait for each other take a tiny model ten times as long.
    environ["OMP_NUM_THREADS"] = "1"
    pipe = subprocess.PIPE
    return subprocess.Popen([str(a) for a in argv], stdout=pipe, stderr=pipe, text=True, env=environ)


@pytest.mark.server
@pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI: set COMFYUI_PATH")
def test_interrupted_run_again_and_the_same_elsewhere(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "twice").mkdir()
    (tmp_path / "once").mkdir()
    twice, once = (tmp_path / name / "out.safetensors" for name in ("twice", "once"))
    process = start(files, twice)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("twice/*.partial/*/[!.]*_blocks*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == cli.EXIT_INTERRUPTED and "run the same command again" in error
    assert not twice.exists()
    for out in (twice, once):
        process = start(files, out)
        text, error = process.communicate(timeout=120)
        assert (process.returncode, error) == (0, ""), error
        assert f"{out}: " in text and "outputs for the activations of the calibration" in text
        assert sorted(os.listdir(out.parent)) == REPORTED
    assert twice.read_bytes() == once.read_bytes()
    assert open_checkpoint(once).rank == 16
    assert json.loads(read_all(once)[1]["svdq.quantizer"])["prompts"] == 3
    process = start(files, once)
    text, error = process.communicate(timeout=60)
    assert process.returncode == cli.EXIT_USER_ERROR and "add --force" in error and error.count("\n") == 1
