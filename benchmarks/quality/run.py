"""The process that ``python3 . bench quality`` starts: ComfyUI, one model, all configurations.

    python benchmarks/quality/run.py COMFYUI FOLDER JSON -- ComfyUI's options

JSON says what to measure: the fields of Options. Prints lines "ROW {json}": ``status`` is what happens, ``result`` at
the end what report.result gives. If there are pictures, FOLDER/sheet.jpg shows some.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comfyui_process import start_comfyui
from full_size import register_package

_LARGE = 1024  # hidden size


@dataclass(frozen=True)
class Options:
    """model, vae, reader: files; without a model full-size blocks with random weights, without a vae one that is set by
    formula, without a reader nobody looks at the pictures · names: configurations, None for all · prompts,
    calibration: numbers of prompts · size: of pictures in pixels · steps · batch: pictures at once · iterations: of the
    quantizer."""

    model: str | None
    vae: str | None
    reader: str | None
    names: list[str] | None
    prompts: int
    calibration: int
    size: int
    steps: int
    batch: int
    iterations: int


def main(folder: Path, options: Options) -> None:
    """Measure and report. folder: for files that are only needed meanwhile, and the sheet."""
    if importlib.util.find_spec("kornia") is None:  # better now than when there are pictures to compare
        raise SystemExit("kornia is missing, which ComfyUI's requirements.txt names; run: pip install kornia")
    import comfy.model_management as management
    import comfy.utils
    import torch

    from svdq.benchmarks.quality import measure, report, sheet, synthetic
    from svdq.benchmarks.quality.configurations import choose
    from svdq.benchmarks.quality.models import Models
    from svdq.benchmarks.quality.tasks import make_task
    from svdq.loaders.demo_assets import write_demo_vae
    from svdq.quantizer.source import open_dense

    def progress(text: str) -> None:
        row(status=text)

    started, device = time.monotonic(), management.get_torch_device()
    if options.model is None:
        progress("drawing random weights")
        config, state = synthetic.FULL_SIZE, synthetic.state_dict(synthetic.FULL_SIZE, device)
    else:
        config, state = open_dense(options.model).config, comfy.utils.load_torch_file(options.model)
    vae = options.vae
    if vae is None:
        vae = folder / "vae.safetensors"
        write_demo_vae(vae)
    task = make_task(
        (config.context_in_dim, config.vec_in_dim), options.prompts, options.calibration, Path(vae),
        options.reader and Path(options.reader), size=options.size, steps=options.steps, batch=options.batch,
    )  # fmt: skip
    quantizer = device.type
    if config.hidden_size < _LARGE:
        # For such layers a GPU takes longer to start its kernels than a CPU core to be done, and threads wait for each
        # other.
        quantizer = "cpu"
        torch.set_num_threads(1)
    models = Models(state, task, folder, quantizer, options.iterations)
    chosen = choose(options.names, device.type == "cuda")
    found = measure.measure(models, task, chosen, progress, pictures=options.model is not None)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    about = {
        "device": name,
        "torch": torch.__version__,
        "prompts": options.prompts,
        "calibration_prompts": options.calibration,
        "size": options.size,
        "steps": options.steps,
        "iterations": options.iterations,
        "model": describe(models, options.model),
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - started, 1),
    }
    if options.model is not None:
        labels = {name: configuration.label for name, configuration in chosen.items()}
        sheet.save(folder / "sheet.jpg", labels, task.texts, found)
    row(result=report.result(about, chosen, found))


def row(**values: object) -> None:
    print("ROW " + json.dumps(values), flush=True)


def describe(models, path: str | None) -> dict:
    """Name and sizes of a model, for the report."""
    config, shapes = models.source.config, models.source.shapes
    count = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values())
    name = "random blocks of FLUX.1-dev's sizes" if path is None else Path(path).name
    blocks = [config.depth, config.depth_single_blocks]
    return {"name": name, "hidden_size": config.hidden_size, "blocks": blocks, "parameters": count}


if __name__ == "__main__":
    comfyui, folder, chosen = sys.argv[1:4]
    register_package()
    start_comfyui(comfyui, sys.argv[sys.argv.index("--") + 1 :])
    main(Path(folder), Options(**json.loads(chosen)))
