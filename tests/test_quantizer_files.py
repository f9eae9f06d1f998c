"""Which files SVDQ Quantize reads and writes, with a MODEL that ComfyUI has read from a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType

import pytest
from files import read_all
from quantizer_models import dense_model, load_dense, save_prompts, save_source
from test_quantizer_calibrated import FAST, folder, quantize  # noqa: F401 (a fixture)
from test_quantizer_command import arguments
from test_quantizer_solve import one_thread  # noqa: F401 (a fixture)

from svdq.cli import quantize_calibrated
from svdq.loaders import CheckpointError, open_checkpoint
from svdq.quantizer import source

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("name", ["out.safetensors", "out.safetensors.safetensors", "a.b.safetensors"])
def test_the_command_gets_the_file_that_it_names(name: str, folder: Path) -> None:  # noqa: F811
    from svdq.nodes.flux_quantizer import target

    mine, encoded = save_source(folder / "mine.safetensors"), save_prompts(folder / "prompts.safetensors")
    widgets = quantize_calibrated.job_of(arguments(mine, folder / name, "--conditioning", encoded)).widgets
    assert target(widgets["folder"], widgets["filename"]) == str(folder / name)


def test_the_file_of_the_model_is_never_replaced(folder: Path, comfy: ModuleType) -> None:  # noqa: F811
    import comfy.sd

    mine = save_source(folder / "mine.safetensors")
    os.symlink(folder, folder / "linked")
    os.link(mine, folder / "twin.safetensors")
    before = mine.read_bytes()
    model = comfy.sd.load_diffusion_model(str(mine)).clone()
    for filename in ("mine", "linked/mine", "twin"):
        with pytest.raises(CheckpointError, match=rf"{filename}\.safetensors: file: found a file that is read"):
            quantize(model, filename=filename, overwrite=True, **FAST)
    assert mine.read_bytes() == before and not list(folder.glob("*.partial"))
    out = quantize(model, filename="other", **FAST)
    assert quantize(model, filename="other", overwrite=True, **FAST) == out


def test_the_variant_is_that_of_the_source(folder: Path, comfy: ModuleType) -> None:  # noqa: F811
    import comfy.sd

    mine = save_source(folder / "flux1-krea-mine.safetensors")
    assert open_checkpoint(quantize(comfy.sd.load_diffusion_model(str(mine)), **FAST)).variant == "krea"
    assert open_checkpoint(quantize(load_dense(dense_model()), filename="kontext", **FAST)).variant == "kontext"


def test_the_seed_is_of_noise_and_quantizing(folder: Path, comfy: ModuleType) -> None:  # noqa: F811
    """The largest one, too, with which each prompt has noise of its own"""
    model, last = load_dense(dense_model()), 2**64 - 1
    made = json.loads(read_all(quantize(model, calibration_seed=last, **FAST))[1]["svdq.quantizer"])
    assert (made["calibration_seed"], made["seed"]) == (last, last)


@pytest.mark.parametrize("prefix", source._PREFIXES)
def test_prefixes_that_comfyui_reads(prefix: str, comfy: ModuleType) -> None:
    """Those that the command takes for a calibrated run, and no other that the quantizer knows"""
    import comfy.sd

    found = comfy.sd.load_diffusion_model_state_dict({f"{prefix}{k}": t for k, t in dense_model().items()})
    assert (found is not None) is (prefix in quantize_calibrated._COMFYUI_PREFIXES)
