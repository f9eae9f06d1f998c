"""Configurations as MODELs of ComfyUI: our files through our loader, others simulated on the 16-bit model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from torch import Tensor, nn

from ...kernels import FORCE_VARIABLE, Backend, reference
from ...kernels.int4 import W4A4, PackedW4A4
from ...loaders import open_checkpoint
from ...loaders.flux_names import LOW_RANK_LEAVES, AWQSource, W4A4Source
from ...loaders.write import Spec, safetensors_writer
from ...model import load_flux
from ...model.layout_svdq import dequantize
from ...model.ops import QuantizedLinear, is_quantized
from ...nodes.graph_model import FluxCalibration, GraphModel
from ...quantizer import activations, convert, job
from .baselines import BASELINES, Layer
from .configurations import Configuration, File
from .sampling import Task, conditioning, load

CALIBRATION_STEPS = 8  # as the command ``quantize`` has them

Progress = Callable[[str], None]


# ---- reference arithmetic of the int8 mode


class Int8Reference(Backend):
    """The int8 mode of a file in PyTorch, on any device; the loader itself has kernels for it only."""

    def __init__(self) -> None:
        super().__init__("int8", True, "reference arithmetic, for measuring")

    @property
    def layers(self) -> type[Int8Reference]:
        return Int8Reference

    @staticmethod
    def linear_parts_w4a4(x: Tensor, parts: tuple[PackedW4A4, ...], axis: int, bias: Tensor | None) -> Tensor:
        """As kernels.reference.linear_parts_w4a4."""
        column, outputs = 0, []
        for part in parts:
            rows = x if axis == 0 else x[:, column : column + part.k]
            outputs.append(_linear_int8(rows, part.unpack()))
            column += part.k
        total = torch.cat(outputs, dim=1) if axis == 0 else sum(outputs)
        return (total if bias is None else total + bias.float()).to(x.dtype)

    linear_w8a8 = staticmethod(reference.linear_w8a8)

    @staticmethod
    def linear_awq(x: Tensor, weight: Any, bias: Tensor | None, lora: Any = None) -> None:
        """None: a modulation layer is dequantized."""


def _linear_int8(x: Tensor, weight: W4A4) -> Tensor:
    """float32 [M, N], without a bias."""
    operands = reference.quantize_act_int8(x, weight.smooth_factor, weight.proj_down, weight.act_unsigned)
    q, scales, _ = reference.expand_w4_to_int8(weight)
    options = {"out_dtype": torch.float32, "act_unsigned": weight.act_unsigned}
    return reference.gemm_w8a8(*operands, q, scales, weight.proj_up, **options)


# ---- models


class Models:
    """All configurations of one 16-bit model.

    state: bf16 tensors under stock names, as a file has them · folder: for the files that are made · device,
    iterations: of the quantizer.
    """

    def __init__(self, state: dict[str, Tensor], task: Task, folder: Path, device: str, iterations: int) -> None:
        self._task, self._folder, self._device, self._iterations = task, folder, device, iterations
        copies = {name: tensor.clone() for name, tensor in state.items()}
        # The yardstick: the same weights, computed in float32.
        self.exact = comfy.sd.load_diffusion_model_state_dict(copies, model_options={"dtype": torch.float32})
        self.half = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.bfloat16})
        self.source = GraphModel(self.half)
        self.layers = self.source.config.layers()

    @property
    def w4a4(self) -> list[str]:
        """Stock names of the linears that have quantized activations in our format."""
        return [name for name, source in self.layers.items() if isinstance(source, W4A4Source)]

    @contextlib.contextmanager
    def running(self, configuration: Configuration, progress: Progress) -> Iterator[Any]:
        """The MODEL of a configuration."""
        if configuration.file is not None:
            yield _load_file(self.file(configuration.file, progress), configuration.mode)
        elif configuration.baseline is not None:
            with self._replaced(configuration.baseline):
                yield self.half
        else:
            yield self._bf16()

    def _bf16(self) -> Any:
        """The 16-bit model in bf16 arithmetic, also where ComfyUI would choose float32."""
        if self.half.model.get_dtype_inference() == torch.bfloat16:
            return self.half
        patcher = self.half.clone()
        patcher.set_model_compute_dtype(torch.bfloat16)
        return patcher

    # ---- our files

    @cached_property
    def _calibration(self) -> FluxCalibration:
        task = self._task
        prompts = conditioning(task.calibration)
        steps = min(CALIBRATION_STEPS, task.steps)
        return FluxCalibration(self.half, prompts, task.size, task.size, steps, seed=1 << 20)

    def file(self, file: File, progress: Progress = lambda text: None) -> Path:
        """Its path; made when it is first asked for."""
        path = self._folder / f"{file.name}.safetensors"
        if path.exists():
            return path
        if file.rank == 0:
            self._smoothed(path, progress)
            return path
        settings = job.Settings(file.rank, iterations=self._iterations, gptq=file.gptq)
        metadata = job.file_metadata(file.name, self.source.config, file.rank)
        calibration = self._calibration if file.calibrated else None

        def show(done: int, total: int, what: str) -> None:
            progress(f"quantizing {file.name}: {done / total:4.0%} {what}")

        job.quantize(self.source, path, settings, metadata, self._device, True, show, calibration)
        return path

    def _smoothed(self, path: Path, progress: Progress) -> None:
        """Searched smoothing and codes, no branch: what job.py would make if it had rank 0."""
        shapes, units = self.source.shapes, convert.units_of(self.source.config)
        recipe = job.Settings(rank=0, iterations=1).recipe
        names = [name for unit in units for name in convert.input_sections(unit, shapes)]
        inputs = activations.collect(self._calibration, names, lambda done, total: None)
        tensors: dict[str, Tensor] = {}
        for unit in units:
            progress(f"quantizing {path.stem}: {unit.name}")
            seen = activations.Activations(inputs, {})
            tensors |= convert.convert(self.source, unit, recipe, torch.device(self._device), seen)[0]
        # A file without a branch does not have its tensors.
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(LOW_RANK_LEAVES)}
        specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with safetensors_writer(path, specs, job.file_metadata(path.stem, self.source.config, 0)) as write:
            for name, tensor in tensors.items():
                write(name, tensor)

    def bits(self, configuration: Configuration) -> float:
        """Stored per weight of the W4A4 layers, everything but the bias included."""
        if configuration.file is None:
            return 16.0 if configuration.baseline is None else BASELINES[configuration.baseline].bits
        checkpoint, nbytes, count = open_checkpoint(self.file(configuration.file)), 0, 0
        for name in self.w4a4:
            for part in checkpoint.layer(name).parts:
                tensors = (part.qweight, part.wscales, part.smooth_factor, part.proj_down, part.proj_up)
                nbytes += sum(tensor.nbytes for tensor in tensors)
                count += part.n * part.k
        return 8 * nbytes / count

    # ---- baselines

    @contextlib.contextmanager
    def _replaced(self, name: str) -> Iterator[None]:
        """The 16-bit model with other linears in the place of those that our format quantizes."""
        flux, baseline, before = load(self.half), BASELINES[name], {}
        try:
            for layer, source in self.layers.items():
                if isinstance(source, W4A4Source | AWQSource):
                    before[layer] = flux.get_submodule(layer)
                    make = baseline.modulation if isinstance(source, AWQSource) else baseline.make
                    _put(flux, layer, make(self._layer(layer, before[layer])))
            yield
        finally:
            for layer, module in before.items():
                _put(flux, layer, module)

    def _layer(self, name: str, module: nn.Module) -> Layer:
        source = self.layers[name]
        sections: tuple[tuple[slice, bool], ...] = ()
        if isinstance(source, W4A4Source):
            columns = convert.input_sections(convert.Unit(name, {name: source}), self.source.shapes)[name]
            # Parts with one input between them (linear1) are one section, and never unsigned.
            sections = tuple(zip(columns, source.unsigned, strict=False))
        device = self.half.load_device
        bias = None if module.bias is None else module.bias.detach().to(device)
        return Layer(module.weight.detach().to(device), bias, sections)


def _put(flux: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(flux.get_submodule(parent), leaf, module)


def _load_file(path: Path, mode: str) -> Any:
    forced = {"int4": "int4-reference", "int8": "int4-reference", "16bit": "16bit", "int4-kernels": "int4"}.get(mode)
    with _forced(forced):
        patcher = load_flux(str(path), "int8" if forced is None else "auto")
    if mode == "int8":
        for module in patcher.model.diffusion_model.modules():
            if isinstance(module, QuantizedLinear):
                module.backend = Int8Reference()
    return patcher


@contextlib.contextmanager
def _forced(value: str | None) -> Iterator[None]:
    before = os.environ.pop(FORCE_VARIABLE, None)
    if value is not None:
        os.environ[FORCE_VARIABLE] = value
    try:
        yield
    finally:
        os.environ.pop(FORCE_VARIABLE, None)
        if before is not None:
            os.environ[FORCE_VARIABLE] = before


def dense_weight(module: nn.Module) -> Tensor:
    """float32 [N, K]: the weight that a linear of any configuration multiplies with."""
    weight = module.dense if hasattr(module, "dense") else module.weight
    return dequantize(weight, torch.float32)[0] if is_quantized(weight) else weight.detach().float()
