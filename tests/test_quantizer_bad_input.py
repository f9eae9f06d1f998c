"""What ``quantize`` says of sources, weights, settings and targets that it cannot use."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from files import Tensors, changed, tiny
from quantizer_models import FAST, dense_model
from safetensors.torch import load_file, save_file
from test_quantizer_solve import one_thread  # noqa: F401 (a fixture)

from svdq.cli.dequantize import effective
from svdq.cli.quantize import quantize
from svdq.loaders import CheckpointError, open_checkpoint
from svdq.quantizer.source import open_dense


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "tiny.safetensors"
    save_file(dense_model(), path)
    return path


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: t.update({"single_blocks.0.linear1.weight": poisoned(t["single_blocks.0.linear1.weight"])}),
         r"single_blocks\.0\.linear1\.weight: found 2 of 114688 values NaN or infinite"),
        (lambda t: t.update({"double_blocks.0.img_mlp.0.qweight": torch.zeros(4, dtype=torch.int8)}),
         "found a model that is quantized already"),
        (lambda t: t.update({"double_blocks.0.img_mlp.0.weight": t["double_blocks.0.img_mlp.0.weight"].to(
            torch.float8_e4m3fn)}), "img_mlp.0.weight: found dtype F8_E4M3, expected BF16 or F16 or F32"),
        (lambda t: t.pop("single_blocks.0.linear2.bias"), "linear2.bias: found no such key"),
        (lambda t: t.pop("double_blocks.0.img_attn.qkv.weight"), "a model without .*: not FLUX.1"),
        (lambda t: t.pop("img_in.weight"), "img_in.weight: found no such key"),
        (lambda t: t.update({"double_blocks.0.img_attn.proj.weight": torch.zeros(128, 64)}),
         r"shape \[128, 64\], expected \[128, 128\]"),
        (lambda t: t.update({"img_in.weight": torch.zeros(100, 64)}), "found hidden size 100"),
        (lambda t: t.update({"distilled_layer.weight": torch.zeros(4)}), "1 keys that no FLUX.1 model has"),
        (lambda t: [t.clear(), t.update({"x.lora_up.weight": torch.zeros(4)})], "found a LoRA"),
        (lambda t: t.clear(), "tensors: found none at all"),
    ],
    ids=["nan", "quantized", "fp8", "missing", "not-flux", "no-ends", "shape", "hidden", "extra", "lora", "empty"],
)  # fmt: skip
def test_bad_sources(change: Callable, match: str, source: Path, tmp_path: Path) -> None:
    path = shutil.copy(source, tmp_path / source.name)
    broken = changed(Path(path), lambda tensors, _: change(tensors))
    with pytest.raises(CheckpointError, match=match) as error:
        quantize(broken, tmp_path / "out", **FAST)
    assert str(error.value).startswith(str(broken)) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[3, 5], tensor[3, 6] = float("nan"), float("inf")
    return tensor


def test_a_checkpoint_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="quantized already"):
        open_dense(tiny(tmp_path))
    with pytest.raises(CheckpointError, match=r"no \.safetensors file in it"):
        open_dense(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="expected a readable file"):
        open_dense(tmp_path / "none")


def test_only_the_model_of_an_all_in_one_file_is_judged(source: Path, tmp_path: Path) -> None:
    encoder = "text_encoders.t5xxl.transformer."
    scale = {f"{encoder}scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), f"{encoder}0.scale_weight": torch.ones(())}
    model = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(source).items()}
    save_file(model | scale, tmp_path / "all.safetensors")
    assert open_dense(tmp_path / "all.safetensors").shapes == open_dense(source).shapes
    save_file(model | {"model.diffusion_model.scaled_fp8": torch.zeros(2)}, tmp_path / "quantized.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.diffusion_model\.scaled_fp8: found a model that is quantized"):
        open_dense(tmp_path / "quantized.safetensors")


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_is_for_calibrated_runs(scaled: bool, source: Path, tmp_path: Path) -> None:
    tensors, name = load_file(source), "double_blocks.0.img_mlp.0"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors | ({f"{name}.scale_weight": torch.ones(())} if scaled else {}), tmp_path / "fp8")
    with pytest.raises(CheckpointError, match="leave --no-calibration out: calibrated runs take fp8"):
        quantize(tmp_path / "fp8", tmp_path / "out", **FAST)


def test_weights_with_zero_columns(source: Path, tmp_path: Path) -> None:
    def silence(tensors: Tensors, _: Any) -> None:
        tensors["double_blocks.0.img_mlp.0.weight"][:, :70] = 0
        tensors["double_blocks.0.txt_mlp.2.weight"].zero_()
        tensors["single_blocks.0.modulation.lin.weight"].zero_()

    path = changed(Path(shutil.copy(source, tmp_path / "tiny.safetensors")), silence)
    quantize(path, tmp_path / "out", **FAST)
    checkpoint = open_checkpoint(tmp_path / "out")
    for name in ("double_blocks.0.txt_mlp.2", "single_blocks.0.modulation.lin"):
        assert effective(checkpoint.layer(name), torch.float32)[0].eq(0).all()
    columns = effective(checkpoint.layer("double_blocks.0.img_mlp.0"), torch.float32)[0][:, :70]
    assert columns.abs().max() < 2e-3
    nothing = next(x for x in json.loads((tmp_path / "out.report.json").read_text())["layers"] if "context_fc2" in
                   x["name"])  # fmt: skip
    assert nothing["weight_sqnr_db"] is None


def test_values_beyond_fp16_are_named(source: Path, tmp_path: Path) -> None:
    for name in ("double_blocks.0.img_mlp.0.weight", "img_in.weight", "double_blocks.0.img_mod.lin.bias"):
        path = Path(shutil.copy(source, tmp_path / "tiny.safetensors"))
        big = changed(path, lambda tensors, _, name=name: tensors[name].mul_(1e7))
        with pytest.raises(CheckpointError, match=r"beyond the range of float16.*--dtype bf16"):
            quantize(big, tmp_path / "out", **FAST, dtype="fp16")


@pytest.mark.parametrize("rank", [0, 8, 24, 144, -16])
def test_ranks_that_do_not_fit(rank: int, source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"rank: found {rank}, expected a multiple of 16 up to 128"):
        quantize(source, tmp_path / "out", rank)


def test_targets(source: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(source, tmp_path / "copy.safetensors"))
    with pytest.raises(CheckpointError, match="--force"):
        quantize(source, copy, **FAST)
    with pytest.raises(CheckpointError, match="a file that is read"):
        quantize(copy, copy, **FAST, force=True)
    assert os.listdir(tmp_path) == [copy.name] and copy.read_bytes() == source.read_bytes()
    quantize(source, copy, **FAST, force=True)
    assert open_checkpoint(copy).rank == FAST["rank"]
    with pytest.raises(CheckpointError, match="Create it first"):
        quantize(source, tmp_path / "none" / "out", **FAST)
    with pytest.raises(CheckpointError, match="a folder of that name"):
        quantize(source, "", **FAST)
