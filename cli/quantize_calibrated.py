"""``quantize`` with calibration: a headless ComfyUI loads the model, runs it on the prompts, and the node quantizes."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..loaders.safetensors_file import problem, read_header
from ..loaders.weights import FluxConfig
from ..loaders.write import check_not_read, check_target
from ..quantizer.job import MAX_STEPS, SIDES, Settings, check_settings
from ..quantizer.prompts import BUILTIN_PROMPTS, read_lines, read_prompts
from ..quantizer.source import is_fp8, naming, open_dense
from . import ROOT, UserError
from .comfy_client import ComfyError, ConnectionLost, Event
from .comfy_server import ComfyServer, ServerFailed
from .environment import Environment, comfyui_of_user, exclusive, work_directory
from .quantize import BUILTIN, TimeLeft
from .workflow import offered_file

NODE = "SVDQFluxQuantize"
_COMFYUI_PREFIXES = ("", "model.diffusion_model.")  # of FLUX.1 models that UNETLoader takes
_GIVEN = "given-to-quantize"  # folder or file, inside one of ComfyUI's, for a link to what the command line names
_ENCODERS = {"clip_name1": ("clip_l*",), "clip_name2": ("t5xxl*fp16*", "t5xxl*")}


@dataclass(frozen=True)
class Job:
    """source, out: model and file to write · conditioning: file of encoded prompts, or None and prompts: their texts ·
    widgets: of the node · text_encoders: one more folder to look for them in."""

    source: Path
    out: Path
    conditioning: Path | None
    prompts: tuple[str, ...]
    widgets: dict[str, Any]
    text_encoders: Path | None
    cpu: bool | None


def job_of(args: argparse.Namespace) -> Job:
    """What a command line asks for, checked as far as that takes no time. Raises UserError, CheckpointError."""
    for side in args.size:
        if not SIDES[0] <= side <= SIDES[1]:
            raise UserError(f"--size: {side} is not from {SIDES[0]} to {SIDES[1]} pixels")
    if args.steps > MAX_STEPS:
        raise UserError(f"--steps: {args.steps} is more than {MAX_STEPS}")
    source, out = Path(args.file).absolute(), Path(args.out).absolute()
    if source.is_dir():
        raise UserError(
            f"{source} is a folder: calibration needs one file, as ComfyUI loads it; "
            "or add --no-calibration to use the weights alone, which is worse"
        )
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: name a .safetensors file")
    config = _config_of(source)
    read = (source, args.conditioning, None if args.prompts == BUILTIN else args.prompts)
    check_not_read(out, filter(None, read))
    check_target(out, 0, args.force)
    settings = Settings(
        args.rank, args.dtype, args.iterations, args.seed, args.gptq, args.target_error or 0.0, tuple(args.keep_16bit),
        tuple(args.keep_int8),
    )  # fmt: skip
    check_settings(settings, out, True, config)
    if args.text_encoders and not args.text_encoders.is_dir():
        raise UserError(f"--text-encoders {args.text_encoders}: no such folder")
    if args.conditioning:
        read_prompts(args.conditioning)
        prompts: list[str] = []
    else:
        prompts = read_lines(BUILTIN_PROMPTS if args.prompts == BUILTIN else args.prompts)
    widgets = {
        "filename": out.name, "folder": "output", "rank": settings.rank, "gptq": settings.gptq, "width": args.size[0],
        "height": args.size[1], "steps": args.steps, "calibration_seed": settings.seed, "overwrite": args.force,
        "iterations": settings.iterations, "dtype": settings.dtype, "target_error": settings.target_error,
        "keep_16bit": " ".join(settings.keep_16bit), "keep_int8": " ".join(settings.keep_int8),
    }  # fmt: skip
    cpu = {"auto": None, "cpu": True, "cuda": False}[args.device]
    conditioning = Path(args.conditioning).absolute() if args.conditioning else None
    return Job(source, out, conditioning, tuple(prompts), widgets, args.text_encoders, cpu)


def _config_of(source: Path) -> FluxConfig | None:
    """Sizes of the model; None for fp8, which is for ComfyUI to judge. Raises CheckpointError."""
    path = str(source)
    tensors = {key: (path, info) for key, info in read_header(path).tensors.items()}
    prefix, _ = naming(path, tensors)
    if prefix not in _COMFYUI_PREFIXES:
        expected = f"keys without a prefix or with {_COMFYUI_PREFIXES[-1]}, which ComfyUI reads"
        remedy = "Rename the keys, or add --no-calibration to use the weights alone, which is worse"
        raise problem(path, "keys", f"the prefix {prefix}", expected, remedy)
    if any(is_fp8(info) for key, (_, info) in tensors.items() if key.startswith(prefix)):
        return None
    return open_dense(source).config


def run(job: Job, show: Callable[[str], None]) -> None:
    """Do it; ``show`` is called with what happens. Work that was interrupted goes on. Raises UserError."""
    base = work_directory()
    python = Path(sys.executable) if comfyui_of_user() is not None else Environment(ROOT / ".venv").ensure()
    base.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive(base / "demo.lock", "ComfyUI of this clone is in use; waiting for it."))
        model = stack.enter_context(_linked(job.source, base / "models" / "diffusion_models" / _GIVEN))
        file = None
        if job.conditioning is not None:
            file = stack.enter_context(_linked(job.conditioning, base / "input", f"{_GIVEN}.safetensors"))
        folders = {"text_encoders": [job.text_encoders.absolute()]} if job.text_encoders else {}
        options = ("--output-directory", str(job.out.parent))
        server = ComfyServer(base, python=python, cpu=job.cpu, extra_arguments=options, model_folders=folders)
        show("starting ComfyUI")
        try:
            with server:
                prompt = make_prompt(job, os.path.join(_GIVEN, model), file, server.client.object_info())
                try:
                    server.client.run(prompt, on_event=Display(show).event)
                except ConnectionLost as error:
                    raise UserError(server.exit_reason(), exit_code=1) from error
        except ServerFailed as error:
            raise UserError(str(error), exit_code=1) from error
        except ComfyError as error:
            raise UserError(f"{error} (log: {server.log}; finished layers are kept)") from error


def make_prompt(job: Job, model: str, file: str | None, object_info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """In ComfyUI's API format. model, file: names under which ComfyUI has model and conditioning."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    prompt = {
        "model": node("UNETLoader", unet_name=model, weight_dtype="default"),
        "quantize": node(NODE, model=["model", 0], conditioning=["prompts", 0], **job.widgets),
    }
    if file is not None:
        prompt["prompts"] = node("SVDQLoadConditioning", file=file)
        return prompt
    encoders = {name: _encoder(object_info, name) for name in _ENCODERS}
    prompt["encoders"] = node("DualCLIPLoader", **encoders, type="flux")
    ends = []
    for index, text in enumerate(job.prompts):
        ends.append(f"text {index}")
        prompt[ends[-1]] = node("CLIPTextEncode", clip=["encoders", 0], text=text)
    # In pairs, of which a long list needs few levels: ComfyUI follows links by recursion.
    while len(ends) > 1:
        pairs, rest = list(zip(ends[::2], ends[1::2], strict=False)), ends[len(ends) // 2 * 2 :]
        ends = []
        for one, other in pairs:
            ends.append(f"prompts {len(prompt)}")
            prompt[ends[-1]] = node("ConditioningCombine", conditioning_1=[one, 0], conditioning_2=[other, 0])
        ends += rest
    prompt["quantize"]["inputs"]["conditioning"] = [ends[0], 0]
    return prompt


def _encoder(object_info: dict[str, Any], name: str) -> str:
    file = offered_file(object_info, "DualCLIPLoader", name, _ENCODERS[name])
    if file is not None:
        return file
    raise UserError(
        f"no {_ENCODERS[name][-1]} found to encode prompts: put clip_l and t5xxl into the text_encoders folder of your "
        "ComfyUI (COMFYUI_PATH) or name their folder with --text-encoders; or encode the prompts elsewhere with the "
        "node SVDQ Save Conditioning and use --conditioning; or add --no-calibration to use the weights alone, "
        "which is worse"
    )


class Display:
    """Says what the server is at. show: takes a line that replaces the one before."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show, self._left, self._what = show, TimeLeft(), "calibrating"

    def event(self, event: Event) -> None:
        if event.type == "executing" and event.data.get("node"):
            names = {"model": "loading the model", "quantize": "calibrating"}
            self._show(names.get(event.data["node"], "encoding prompts"))
        elif event.type == "text" and event.data["node"] == "quantize" and event.data["text"] != self._what:
            # The bar runs from 0 to 100 % for each time that the model is watched, and goes on for quantizing.
            self._what, self._left = event.data["text"], TimeLeft()
        elif event.type == "progress" and event.data["node"] == "quantize" and event.data["max"]:
            self._show(f"{self._what}: {self._left.text(event.data['value'], event.data['max'])}")


@contextlib.contextmanager
def _linked(path: Path, folder: Path, name: str | None = None) -> Iterator[str]:
    """A link to ``path`` in ``folder`` while the block runs; its name. A copy where there are no links."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / (name or f"{path.stem}.safetensors")
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(path)
    except OSError:
        shutil.copyfile(path, link)
    try:
        yield link.name
    finally:
        link.unlink(missing_ok=True)
