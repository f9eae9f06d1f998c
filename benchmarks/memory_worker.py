"""One FLUX model on one card in one memory mode, in a process of its own; started by memory_caps.py.

    python benchmarks/memory_worker.py COMFYUI FOLDER SETTINGS

SETTINGS is JSON: model (ours or bf16), gib (of the card), mode (dynamic or static), size (pixels), steps, images,
profile (whether to profile a step). Prints "ROW {json}": the columns of memory_caps.py.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from comfyui_process import finish_node, start_comfyui
from full_size import register_package, timed
from full_size_files import CLIP_L, T5, VAE
from memory_caps import DENSE, OPTIONS, QUANTIZED
from small_card import Peak, SmallCard

PROMPTS = ("a red fox in fresh snow, morning light", "an old harbour at night, lamps, rain on the stones")
GUIDANCE = 3.5
GIB = 2**30


def main(comfyui: str, folder: Path, settings: dict[str, Any]) -> None:
    card = SmallCard(settings["gib"])
    register_package()
    dynamic = start_comfyui(comfyui, OPTIONS[settings["mode"]], card.report)
    import torch

    row: dict[str, Any] = {"finished": False}
    try:
        if dynamic != (settings["mode"] == "dynamic"):
            raise RuntimeError("ComfyUI has no dynamic VRAM here")
        with Peak(card) as peak, torch.inference_mode():
            run(folder, settings, row)
    except Exception as error:  # out of memory is a result
        row["failed"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    row["torch_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    row["card_gib"] = round(peak.bytes / GIB, 2)
    print("ROW " + json.dumps(row), flush=True)


def run(folder: Path, settings: dict[str, Any], row: dict[str, Any]) -> None:
    """Make the images and fill ``row``, as far as it comes."""
    import comfy.sd
    import comfy.utils
    import torch

    from svdq.model import load_flux

    encoders = [str(folder / CLIP_L), str(folder / T5)]
    clip = comfy.sd.load_clip(encoders, clip_type=comfy.sd.CLIPType.FLUX)
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(folder / VAE)))
    if settings["model"] == "ours":
        patcher = load_flux(str(folder / QUANTIZED))
    else:
        patcher = comfy.sd.load_diffusion_model(str(folder / DENSE))
    row["model_gib"] = round(patcher.model_size() / GIB, 2)
    for number in range(settings["images"]):
        image, times = picture(clip, patcher, vae, PROMPTS[number % len(PROMPTS)], number, settings)
        if not torch.isfinite(image).all():
            raise RuntimeError("the image is not finite")
        if number == 0:
            row["first_image_s"] = times["image_s"]
        row |= times
    row["finished"] = True
    if settings["profile"]:
        row |= profile(patcher, settings["size"])


def picture(clip, patcher, vae, text: str, seed: int, settings: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """(image [1, H, W, 3], seconds: encode_s, first_s (to the end of the first step), step_s (median of the others),
    decode_s, image_s (all of it); loaded_gib (of the model, as ComfyUI counts))."""
    start = time.perf_counter()
    positive, encode = timed(lambda: node(lambda: conditioning(clip, text)))
    size = settings["size"] // 8
    ends: list[float] = []
    latent, _ = timed(lambda: node(lambda: sample(patcher, positive, size, seed, settings["steps"], ends)))
    loaded = patcher.loaded_size()
    image, decode = timed(lambda: node(lambda: vae.decode(latent)))
    begin, *ends = ends
    later = [after - before for before, after in itertools.pairwise(ends)]
    seconds = {
        "encode_s": encode,
        "first_s": ends[0] - begin,
        "step_s": statistics.median(later),
        "decode_s": decode,
        "image_s": time.perf_counter() - start,
    }
    return image, {name: round(value, 3) for name, value in seconds.items()} | {"loaded_gib": round(loaded / GIB, 2)}


def node(action) -> Any:
    """``action`` as ComfyUI runs a node."""
    try:
        return action()
    finally:
        finish_node()


def conditioning(clip, text: str) -> list:
    """What CLIPTextEncode and FluxGuidance give."""
    import node_helpers

    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return node_helpers.conditioning_set_values(encoded, {"guidance": GUIDANCE})


def sample(patcher, positive: list, size: int, seed: int, steps: int, ends: list[float]) -> Any:
    """KSampler's work on a latent of ``size``; ``ends`` gets the time of the start and of each step's end."""
    import comfy.sample
    import torch

    def ended(*_: object) -> None:
        torch.cuda.synchronize()
        ends.append(time.perf_counter())

    latent = comfy.sample.fix_empty_latent_channels(patcher, torch.zeros(1, 16, size, size))
    noise = comfy.sample.prepare_noise(latent, seed)
    ended()
    return comfy.sample.sample(
        patcher, noise, steps, 1.0, "euler", "simple", positive, positive, latent, callback=ended, disable_pbar=True
    )  # fmt: skip


def profile(patcher, size: int) -> dict[str, float]:
    """copy_ms (weights on their way to the GPU in one step, as it is after a few) and hidden_percent of it, which lies
    under kernels."""
    import comfy.model_management as management
    import torch
    from flux import inputs

    memory = patcher.memory_required([1, 16, size // 8, size // 8])
    management.load_models_gpu([patcher], memory_required=memory)
    values = inputs(patcher, size, 1)

    def step() -> None:
        patcher.model.diffusion_model(**values)
        torch.cuda.synchronize()

    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as result:
        _, seconds = timed(step)
    finish_node()
    copies, kernels = [], []
    for event in result.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            span = (event.time_range.start, event.time_range.end)
            if "HtoD" in event.name:
                copies.append(span)
            elif not event.name.startswith(("Memcpy", "Memset")):
                kernels.append(span)
    copied, hidden = length(merged(copies)), overlap(merged(copies), merged(kernels))
    return {
        "profiled_ms": round(seconds * 1e3, 1),
        "copy_ms": round(copied / 1e3, 1),
        "kernel_ms": round(length(merged(kernels)) / 1e3, 1),
        "hidden_percent": round(100 * hidden / copied, 1) if copied else 100.0,
    }


Spans = list[tuple[float, float]]


def merged(spans: Spans) -> Spans:
    """``spans`` as disjoint ones, in order."""
    result: Spans = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def length(spans: Spans) -> float:
    """What disjoint ``spans`` cover."""
    return sum(end - start for start, end in spans)


def overlap(first: Spans, second: Spans) -> float:
    """What two lists of disjoint, ordered spans both cover."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        total += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
