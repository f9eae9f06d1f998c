"""Fused blocks in the arithmetic of INT4 and INT8 and in bf16, as on a GPU, by PyTorch on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import reference_layers
import torch
from flux_models import dense_state_dict, inputs, rms_relative
from int8_files import NAMES, with_int8
from test_memory_modes import write_lora
from torch import Tensor

from svdq.loaders import open_checkpoint

pytestmark = pytest.mark.comfy

SIZES = ((16, 64, 1), (16, 20, 1), (18, 77, 1), (16, 20, 2))  # side in latent pixels, tokens, pictures


@pytest.fixture(scope="module")
def files(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    exceptions = with_int8(tiny, NAMES, tmp_path_factory.mktemp("int8") / "int8.safetensors")
    return {"4-bit": tiny, "exceptions in INT8": exceptions}


def outputs(patcher, path: Path) -> list[Tensor]:
    """Of one forward pass for each of SIZES, in bf16."""
    import comfy.model_management as management

    management.load_models_gpu([patcher])
    found = []
    for size, tokens, batch in SIZES:
        values = inputs(open_checkpoint(path), size, tokens, batch, torch.bfloat16)
        with torch.inference_mode():
            found.append(patcher.model.diffusion_model(values.pop("x"), **values).float())
    return found


def dense_model(path: Path):
    import comfy.sd

    sd = dense_state_dict(open_checkpoint(path), torch.bfloat16, torch.device("cpu"))
    return comfy.sd.load_diffusion_model_state_dict(sd, model_options={"dtype": torch.bfloat16})


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("file", ["4-bit", "exceptions in INT8"])
def test_fused_blocks_are_as_near_to_the_dense_model(
    precision: str, file: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the same layers one by one, which round in other places; with a LoRA, too."""
    import comfy.sd
    import comfy.utils

    path, layers = files[file], reference_layers.in_place_of_kernels(monkeypatch)[precision]
    write_lora(tmp_path / "lora.safetensors", open_checkpoint(path).config)
    lora = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
    lora = {name: tensor for name, tensor in lora.items() if not name.endswith("diff_b")}  # biases are not fused
    models = [reference_layers.load(path, layers, fused) for fused in (True, False)] + [dense_model(path)]
    plain = [outputs(model, path) for model in models]
    patched = [outputs(comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0)[0], path) for model in models]
    for fused, stock, dense in (plain, patched):
        error = rms_relative(stock, dense)
        found = rms_relative(fused, stock) / error, rms_relative(fused, dense) / error
        print(f"{precision}, {file}: stock - dense {error:.4f}; fused - stock, fused - dense: {found} times that")
        assert error < {"int4": 0.3, "int8": 0.05}[precision]
        assert max(found) <= 1.1
    assert rms_relative(patched[0], plain[0]) > 0.1, "the LoRA does something"
    assert all(torch.equal(a, b) for a, b in zip(outputs(models[0], path), plain[0], strict=True))
