"""``demo``: one picture through the real ComfyUI, from the tiny FLUX in assets/ or from a real checkpoint.

ComfyUI is started headless with this pack installed, a shipped workflow is queued over HTTP, and the picture is saved.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ROOT, UserError
from .arguments import positive, seed, size
from .comfy_client import ComfyError, ConnectionLost, Event, images_of
from .comfy_server import ComfyServer, ServerFailed
from .console import StatusLine
from .environment import comfyui_of_user, exclusive, work_directory
from .workflow import Prompt, WorkflowError, find_node, offered_file, set_input, to_prompt

if TYPE_CHECKING:
    from ..loaders import Checkpoint

DEMO_WORKFLOW = "SVDQ FLUX demo.json"
DEV_WORKFLOW = "SVDQ FLUX dev - text to image.json"
SCHNELL_WORKFLOW = "SVDQ FLUX schnell - text to image.json"
SCHNELL_STEPS = 4
ASSETS = ROOT / "assets"
# Files of ASSETS, under which names the demo workflow asks for them: that of the model, and this one.
DEMO_VAE = "demo-flux-vae.safetensors"
# Stands in for the VAE of other models.
FORMULA_VAE = "svdq-demo-formula-vae.safetensors"

# Width of FLUX.1's T5 embedding. A file with another one is a test model, for which no text encoder exists.
T5_WIDTH = 4096

# Folder, inside a kind of model, for links to files named on the command line: no clash with what lies there already.
_GIVEN = "given"

_SAMPLER = "SVDQFluxSampler"
_LOG_LINE = "SVDQ FLUX: "

_WHERE_TO_GET = (
    "clip_l.safetensors and t5xxl_fp8_e4m3fn.safetensors (https://huggingface.co/comfyanonymous/flux_text_encoders) go "
    "into {models}/text_encoders or the folder of --text-encoders, ae.safetensors "
    "(https://huggingface.co/black-forest-labs/FLUX.1-schnell) into {models}/vae or behind --vae; with --demo-prompt "
    "neither is needed, and the picture has no meaning"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``demo``."""
    parser.add_argument("--model", type=Path, metavar="FILE", help="SVDQuant INT4 FLUX file or legacy folder to use")
    parser.add_argument("--prompt", metavar="TEXT", help="what the picture should show")
    parser.add_argument("--steps", type=positive, help="sampling steps (default: the workflow's; schnell 4)")
    parser.add_argument("--size", type=size, metavar="WxH", help="size of the picture, multiples of 16")
    parser.add_argument("--seed", type=seed, help="seed of the noise")
    parser.add_argument("--output", type=Path, metavar="PNG", default=ROOT / "out" / "demo.png", help="file to write")
    parser.add_argument("--text-encoders", type=Path, metavar="DIR", help="folder with t5xxl* and clip_l*")
    parser.add_argument("--vae", type=Path, metavar="FILE", help="FLUX's VAE, ae.safetensors")
    parser.add_argument("--demo-prompt", action="store_true", help="stand-ins for text encoders and VAE")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--serve", action="store_true", help="keep ComfyUI running afterwards, to open it in a browser")


def run(args: argparse.Namespace) -> int:
    """Make the picture; returns the exit code."""
    clock = Clock(args.started)
    clock.lap("environment")
    _check_paths(args)
    base = work_directory()
    base.mkdir(parents=True, exist_ok=True)
    job = Job(args, base / "models")
    with exclusive(base / "demo.lock", "Another demo of this clone is running; waiting for it."):
        job.prepare_models()
        clock.lap("demo files" if args.model is None else "header of the model file")
        _run_comfyui(args, job, base, clock)
    return 0


class Job:
    """What to run: a shipped workflow, the model files it gets, and the options of the command line.

    ``stand_ins`` is true where the demo prompt and a demo VAE take the place of text encoders and VAE.
    """

    def __init__(self, args: argparse.Namespace, models: Path) -> None:
        self._args = args
        self._models = models
        self._checkpoint = _open(args.model) if args.model else None
        self.stand_ins = args.demo_prompt or self._is_test_model()
        self.workflow = self._read_workflow()
        self.model_name = self._shipped_name("SVDQFluxLoader")
        self.vae_name = self._shipped_name("VAELoader") if self.stand_ins else None

    @property
    def model_path(self) -> Path:
        """The model as a person knows it."""
        return self._args.model.absolute() if self._args.model else self._models / "diffusion_models" / self.model_name

    def prepare_models(self) -> None:
        """Copy the demo's small files, or link to the given ones; nothing big is copied."""
        if self._checkpoint is None:
            _copy_asset(self.model_name, self._models / "diffusion_models" / self.model_name)
        else:
            self.model_name = _link(self._args.model, self._models / "diffusion_models")
        if self._args.vae:
            self.vae_name = _link(self._args.vae, self._models / "vae")
        elif self._checkpoint is None:
            _copy_asset(DEMO_VAE, self._models / "vae" / self.vae_name)
        elif self.stand_ins:
            from ..loaders.demo_assets import write_demo_vae

            self.vae_name = FORMULA_VAE
            write_demo_vae(self._models / "vae" / self.vae_name)

    def prompt(self, object_info: dict[str, Any]) -> Prompt:
        """The workflow in API format with everything filled in; ``object_info`` says what the server can see."""
        prompt = to_prompt(self.workflow, object_info)
        set_input(prompt, "SVDQFluxLoader", "model_name", self.model_name)
        if not self.stand_ins:
            self._set_text_encoders(prompt, object_info)
        set_input(prompt, "VAELoader", "vae_name", self.vae_name or self._choose(object_info, "VAELoader", "vae_name"))
        given = {
            ("SVDQDemoPrompt" if self.stand_ins else "CLIPTextEncode", "text"): self._args.prompt,
            (_SAMPLER, "seed"): self._args.seed,
            (_SAMPLER, "steps"): self._args.steps or self._usual_steps(),
            ("EmptySD3LatentImage", "width"): self._args.size and self._args.size[0],
            ("EmptySD3LatentImage", "height"): self._args.size and self._args.size[1],
        }
        for (node, name), value in given.items():
            if value is not None:
                set_input(prompt, node, name, value)
        return prompt

    def remark(self) -> str | None:
        """What a person should know before the picture is made."""
        if self._checkpoint is None:
            return (
                "A tiny FLUX, trained for this demo on pictures of 128x128: it draws signs that say a word of 2 to 7 "
                "small letters, and coloured shapes."
            )
        if self._args.demo_prompt:
            return "Demo prompt as asked: the picture has nothing to do with the text."
        if self.stand_ins:
            width = self._checkpoint.config.context_in_dim
            return f"This model's text width is {width}, not FLUX.1's {T5_WIDTH}: using the demo prompt and demo VAE."
        return None

    def _is_test_model(self) -> bool:
        return self._checkpoint is None or self._checkpoint.config.context_in_dim != T5_WIDTH

    def _is_schnell(self) -> bool:
        return self._checkpoint is not None and not self._checkpoint.config.guidance_embed

    def _usual_steps(self) -> int | None:
        return SCHNELL_STEPS if self._is_schnell() else None

    def _read_workflow(self) -> dict[str, Any]:
        real = SCHNELL_WORKFLOW if self._is_schnell() else DEV_WORKFLOW
        path = ROOT / "workflows" / (DEMO_WORKFLOW if self.stand_ins else real)
        return json.loads(path.read_text(encoding="utf-8"))

    def _shipped_name(self, kind: str) -> str:
        """The file name that stands in the workflow's only node of class ``kind``."""
        return next(node["widgets_values"][0] for node in self.workflow["nodes"] if node["type"] == kind)

    def _set_text_encoders(self, prompt: Prompt, object_info: dict[str, Any]) -> None:
        for name in ("clip_name1", "clip_name2"):
            set_input(prompt, "DualCLIPLoader", name, self._choose(object_info, "DualCLIPLoader", name))

    def _choose(self, object_info: dict[str, Any], node: str, name: str) -> str:
        """The first file that the server offers for a loader's input and that looks like the right one."""
        patterns = {
            "clip_name1": ("clip_l*",),
            # The 8-bit file first: half the memory, and hardly a difference.
            "clip_name2": ("t5xxl*fp8*", "t5xxl*"),
            "vae_name": ("ae.*", "ae_*", "*flux*ae*"),
        }[name]
        file = offered_file(object_info, node, name, patterns)
        if file is not None:
            return file
        own = comfyui_of_user()
        models = own / "models" if own is not None else self._models
        raise UserError(f"no {patterns[-1]} found; {_WHERE_TO_GET.format(models=models)}")


class Clock:
    """How long each part took."""

    def __init__(self, started: float) -> None:
        self._started = self._last = started
        self._laps: list[tuple[str, float]] = []

    def lap(self, name: str) -> None:
        """The part that ends now was ``name``."""
        now = time.time()
        self._laps.append((name, now - self._last))
        self._last = now

    def report(self) -> str:
        """One line per part, and the total."""
        rows = [*self._laps, ("in all", self._last - self._started)]
        return "\n".join(f"{'' if row else 'Time':<9}{s:7.1f} s  {name}" for row, (name, s) in enumerate(rows))


def _run_comfyui(args: argparse.Namespace, job: Job, base: Path, clock: Clock) -> None:
    """Start ComfyUI, make and save the picture, report, and with --serve wait for Ctrl-C."""
    folders = {"text_encoders": [args.text_encoders.absolute()]} if args.text_encoders else {}
    previews = ("--preview-method", "latent2rgb")  # as most people have it; ComfyUI starts without
    # Where other programs keep the cores busy, threads wait for each other much longer than this model computes.
    environ = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} if args.model is None else {}
    server = ComfyServer(
        base, cpu=args.cpu or None, extra_arguments=previews, model_folders=folders, environ=environ
    )  # fmt: skip
    print("Starting ComfyUI ...", flush=True)
    try:
        with server:
            clock.lap("start of ComfyUI")
            print(_describe(server), flush=True)
            prompt = job.prompt(server.client.object_info())
            if remark := job.remark():
                print(remark, flush=True)
            progress = Progress(prompt, clock)
            try:
                entry = server.client.run(prompt, on_event=progress.show, on_wait=progress.tick)
            except ConnectionLost as error:
                raise UserError(server.exit_reason(), exit_code=1) from error
            finally:
                progress.status.clear()
            picture = server.client.image(**images_of(entry)[0])
            clock.lap("VAE and PNG")
            write_atomically(args.output, picture)
            print(f"\nPicture    {args.output.absolute()}")
            print(f"Model      {job.model_path}")
            print(f"           {_loaded(server.log_text())}")
            print(clock.report(), flush=True)
            if args.serve:
                _serve(server)
    except WorkflowError as error:
        raise UserError(str(error)) from error
    except ServerFailed as error:
        raise UserError(str(error), exit_code=1) from error
    except ComfyError as error:
        raise UserError(f"{error} (log: {server.log})", exit_code=1) from error


class Progress:
    """Shows which node runs and how far the sampler is, and takes the times of both."""

    def __init__(self, prompt: Prompt, clock: Clock) -> None:
        self.status = StatusLine()
        self._prompt = prompt
        self._clock = clock
        self._sampler = find_node(prompt, _SAMPLER)
        self._started = time.monotonic()
        self._text = "queued"
        self._steps_done = 0

    def show(self, event: Event) -> None:
        """Take one event of the server."""
        if event.type == "executing" and event.data["node"] in self._prompt:
            if self._steps_done and event.data["node"] != self._sampler:
                self._clock.lap("the other steps")
                self._steps_done = 0
            self._text = self._prompt[event.data["node"]]["_meta"]["title"]
            self.tick(important=True)
        elif event.type == "progress" and event.data["node"] == self._sampler:
            if not self._steps_done and event.data["value"]:
                self._clock.lap("loading the model, first step")
            self._steps_done = event.data["value"]
            self._text = f"sampling, step {event.data['value']} of {event.data['max']}"
            self.tick()

    def tick(self, important: bool = False) -> None:
        """Show where things stand."""
        self.status.update(f"  {self._text} ({time.monotonic() - self._started:.0f} s)", important=important)


def _serve(server: ComfyServer) -> None:
    print(f"\nComfyUI is at {server.url}: open Templates, then this pack. Ctrl-C ends it.", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while server.is_running():
            time.sleep(0.5)
        raise UserError(server.exit_reason(), exit_code=1)


def _open(path: Path) -> Checkpoint:
    from ..loaders import open_checkpoint

    return open_checkpoint(path)


def _check_paths(args: argparse.Namespace) -> None:
    """Find out at once what would otherwise fail after minutes."""
    if args.text_encoders and not args.text_encoders.is_dir():
        raise UserError(f"--text-encoders {args.text_encoders}: no such folder")
    if args.vae and not args.vae.is_file():
        raise UserError(f"--vae {args.vae}: no such file")
    if args.output.exists() and not args.output.is_file():
        what = "folder" if args.output.is_dir() else "device, pipe or socket"
        raise UserError(f"--output {args.output} is a {what}; name a file")
    args.output.parent.mkdir(parents=True, exist_ok=True)


def _copy_asset(name: str, target: Path) -> None:
    """Make a file of ``ASSETS`` a model of ComfyUI's. Raises UserError if it is not there."""
    source = ASSETS / name
    if not source.is_file():
        raise UserError(f"{source} is missing: this copy of the pack is not complete; clone it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, source.read_bytes())


def _link(path: Path, folder: Path) -> str:
    """Make ``path`` visible to ComfyUI as a model in ``folder``, without a copy; returns the name it goes by there.

    Only this one file: its own folder may be somebody's home, which ComfyUI would search from top to bottom.
    """
    path = path.absolute()
    # ComfyUI goes by the ending; files in a download cache have none.
    name = path.name if path.is_dir() or path.suffix == ".safetensors" else f"{path.name}.safetensors"
    given = folder / _GIVEN
    shutil.rmtree(given, ignore_errors=True)
    given.mkdir(parents=True)
    (given / name).symlink_to(path, target_is_directory=path.is_dir())
    return os.path.join(_GIVEN, name)


def _describe(server: ComfyServer) -> str:
    stats = server.client.system_stats()
    devices = ", ".join(device["name"] for device in stats["devices"])
    return f"ComfyUI {stats['system']['comfyui_version']} runs on {devices}"


def _loaded(log: str) -> str:
    """What our loader said about the model, from ComfyUI's log."""
    lines = [line for line in log.splitlines() if _LOG_LINE in line]
    return lines[-1].partition(_LOG_LINE)[2] if lines else ""


def write_atomically(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
