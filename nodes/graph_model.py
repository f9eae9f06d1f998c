"""A MODEL of the graph as what the quantizer works on: its weights with all patches, and itself at work on prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import comfy.lora
import comfy.model_management as management
import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ..loaders.safetensors_file import problem
from ..model.ops import QuantizedLinear, is_quantized
from ..quantizer.activations import OnStep
from ..quantizer.source import check_finite, stock_model

NAME = "MODEL"  # what errors call it

_PREFIX = "diffusion_model."
_WEIGHTS = (".weight", ".bias", "_norm.scale")
_SAMPLED = 4096  # values of each tensor that fingerprints look at
_CPU_MOMENTS = 4 << 30
_GPU_SHARE = 4  # of the GPU's memory, that second moments may take, as 1 / _GPU_SHARE

Conditioning = list[list[Any]]
"""ComfyUI's: [embedding [1, T, C], {"pooled_output": ..., "guidance": ...}] for each prompt."""


class GraphModel:
    """A quantizer.source.Source: a MODEL with its LoRAs and other weight patches baked in, in float32 where there are.

    Raises CheckpointError if the MODEL is no FLUX.1 model in 16 bits (or in fp8, which is dequantized).
    """

    def __init__(self, patcher: ModelPatcher) -> None:
        self.path = NAME
        self._patcher = patcher
        flux = patcher.model.diffusion_model
        for name, module in flux.named_modules():
            if isinstance(module, QuantizedLinear) and is_quantized(module.weight):
                remedy = "Connect the original 16-bit model"
                raise problem(NAME, name, "a model that is quantized already", "a FLUX.1 model in 16 bits", remedy)
        parameters = {name: p for name, p in flux.named_parameters() if name.endswith(_WEIGHTS)}
        self.config, self._keys = stock_model(NAME, {name: tuple(p.shape) for name, p in parameters.items()})
        self.shapes = {name: tuple(parameters[key].shape) for name, key in self._keys.items()}
        self.nbytes = sum(2 * parameter.numel() for parameter in parameters.values())
        self.files = _files_of(patcher)

    def tensor(self, name: str) -> Tensor:
        """As DenseModel.tensor; on the device that computes where there are patches."""
        key = self._keys[name]
        weight, patches = self._entry(key)
        if patches:
            # Patches are computed in float32 and stay so: the quantizer has no need for rounded weights.
            full = _PREFIX + key
            weight = weight.to(self._patcher.load_device, torch.float32, copy=True)
            originals = {full: [(weight.clone(), lambda value, **_: value)]}
            weight = comfy.lora.calculate_weight(patches, weight, full, original_weights=originals)
        check_finite(weight, NAME, name)
        return weight

    def fingerprint(self) -> list[object]:
        """Of values: the same for the same model and LoRAs after a restart of ComfyUI."""
        digest = hashlib.blake2b(digest_size=16)
        for key in sorted(self._keys.values()):
            weight, patches = self._entry(key)
            check_finite(weight, NAME, key)  # here, before activations that are not finite name a layer behind it
            digest.update(key.encode())
            for piece in _pieces([weight, patches]):
                digest.update(piece)
        return [digest.hexdigest()]

    def _entry(self, key: str) -> tuple[Tensor, list[Any]]:
        """(weight without patches in a plain float type, patches)."""
        full = _PREFIX + key
        weight, _, convert = get_key_weight(self._patcher.model, full)
        for backup in (self._patcher.backup.get(full), self._patcher.hook_backup.get(full)):
            weight = weight if backup is None else backup[0]
        weight = weight.detach()
        if isinstance(weight, QuantizedTensor):
            weight = weight.dequantize()
        elif convert is not None:
            weight = convert(weight)
        if not weight.dtype.is_floating_point:
            raise problem(NAME, key, f"dtype {weight.dtype}", "16-bit weights", "Connect the original 16-bit model")
        # fp8 has no arithmetic.
        return weight if weight.dtype.itemsize > 1 else weight.float(), self._patcher.patches.get(full, [])


def _files_of(patcher: ModelPatcher) -> tuple[str, ...]:
    """The file that the loader of a MODEL says it has read; () if it says none. LoRAs never say."""
    _, arguments, *_ = patcher.cached_patcher_init or (None, ())
    return tuple(argument for argument in arguments[:1] if isinstance(argument, str))


def _pieces(value: Any) -> Iterator[bytes]:
    """Something of every number and tensor in nested lists, tuples and weight adapters."""
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        flat = flat[:: max(1, flat.numel() // _SAMPLED)]
        yield f"{tuple(value.shape)} {value.dtype}".encode()
        yield flat.float().cpu().numpy().tobytes()
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, dict):
        yield from _pieces(sorted(value.items()))
    elif hasattr(value, "weights"):
        yield from _pieces([type(value).__name__, value.weights])
    elif isinstance(value, str | int | float | None):
        yield repr(value).encode()
    else:
        yield type(value).__name__.encode()


class FluxCalibration:
    """A quantizer.activations.Calibration: ComfyUI's sampler makes one latent for each prompt, without CFG.

    width, height: of the picture · steps: evaluations of the model per prompt, over the whole schedule · seed: of the
    noise. ControlNets and regions of a prompt are left out.
    """

    def __init__(
        self, patcher: ModelPatcher, prompts: Conditioning, width: int, height: int, steps: int, seed: int
    ) -> None:
        self.flux: nn.Module = patcher.model.diffusion_model
        self.device: torch.device = patcher.load_device
        self._patcher = patcher
        kept = ("pooled_output", "guidance", "concat_latent_image", "concat_mask", "reference_latents")
        self._prompts = [[text, {k: v for k, v in extra.items() if k in kept}] for text, extra in prompts]
        latent_format = patcher.get_model_object("latent_format")
        scale = latent_format.spacial_downscale_ratio
        self._latent = torch.zeros(1, latent_format.latent_channels, height // scale, width // scale)
        self._steps, self._seed = steps, seed
        self._size = [width, height]

    @property
    def moment_bytes(self) -> int:
        if self.device.type == "cpu":
            return _CPU_MOMENTS
        return management.get_total_memory(self.device) // _GPU_SHARE

    def describe(self) -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=16)
        for piece in _pieces(self._prompts):
            digest.update(piece)
        return {
            "calibration": "activations",
            "prompts": len(self._prompts),
            "conditioning": digest.hexdigest(),
            "size": self._size,
            "steps": self._steps,
            "calibration_seed": self._seed,
        }

    def make_room(self, nbytes: int) -> None:
        if self.device.type != "cpu":
            management.free_memory(nbytes, self.device)

    def run(self, on_step: OnStep) -> None:
        total = self._steps * len(self._prompts)
        for index, prompt in enumerate(self._prompts):

            def step(number: int, *_: object, before: int = index * self._steps) -> None:
                on_step(before + number + 1, total)

            seed = (self._seed + index) % 2**64
            noise = comfy.sample.prepare_noise(self._latent, seed)
            comfy.sample.sample(
                self._patcher, noise, self._steps, 1.0, "euler", "simple", [prompt], [prompt], self._latent,
                callback=step, disable_pbar=True, seed=seed,
            )  # fmt: skip
