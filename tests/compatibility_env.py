"""What the tests of compatibility share: the list of their cases, models to run them on, and shorthands for nodes.

A case is a function of (model, env) that samples with something of ComfyUI. It runs with the quantized model and with
its dense twin, in one process and in float32, on a GPU too: in bf16 some nodes amplify rounding (CFG 3 to 0.02, a DoRA
to 0.1 on an H200), and no limit could tell that from a mistake.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flux_models import dense_state_dict, forward, inputs, relative

from svdq.loaders import open_checkpoint

LIMIT = 1e-5  # float32: both models compute the same numbers, LoRA in another order
# ComfyUI rounds what it changes in layers of 16 bits to 16 bits; those of the dense twin are float32.
BIAS_LIMIT = 1e-3
ROUNDED_LIMIT = 2e-2  # measured: BOFT 0.0136, all others below 0.01

Run = Callable[[Any, SimpleNamespace], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """run: gives a latent · variant: of the model · limit: of the relative distance to the dense twin · changes:
    whether it has to change plain sampling, so that a node that was silently ignored does not pass; else it must
    not."""

    run: Run
    module: str
    variant: str
    limit: float
    changes: bool


CASES: dict[str, Case] = {}  # by the name that docs/compatibility.md shows


def case(name: str, variant: str = "dev", limit: float = LIMIT, changes: bool = True) -> Callable[[Run], Run]:
    """Put a function on the list."""

    def register(function: Run) -> Run:
        assert name not in CASES, f"two cases are named {name!r}"
        CASES[name] = Case(function, function.__module__, variant, limit, changes)
        return function

    return register


def names(module: str) -> list[str]:
    """The cases of one test file."""
    return [name for name, case in CASES.items() if case.module == module]


# ---- models


@pytest.fixture(scope="module")
def float32(comfy) -> Iterator[None]:
    """What ComfyUI's --force-fp32 does, for one file's tests: 16-bit weights are cast to float32 for use, as on a CPU.
    (--fp32-unet would do nothing: a loader that names a type does not ask for it.)"""
    from comfy import model_management

    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = [backend.allow_tf32 for backend in backends]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_management, "FORCE_FP32", True)
        patch.setattr(model_management, "LORA_COMPUTE_DTYPES", {})  # else the type that the first LoRA was computed in
        for backend in backends:
            backend.allow_tf32 = False
        torch.set_num_threads(1)  # tensors this small gain nothing, and threads wait for each other on a busy machine
        yield
    torch.set_num_threads(threads)
    for backend, allow in zip(backends, allowed, strict=True):
        backend.allow_tf32 = allow


@pytest.fixture(scope="module")
def env(float32, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Models by variant, a conditioning for them, a VAE and so on; the same ones for all files of a run."""
    return _make_env(tmp_path_factory.getbasetemp() / "compatibility")


def load_pair(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """(quantized, dense twin) of a checkpoint; both have to compute in ``dtype``."""
    import comfy.model_management
    import comfy.sd

    from svdq.model import load_flux

    def load_twin(disable_dynamic: bool = False) -> Any:
        sd = dense_state_dict(open_checkpoint(path), dtype, comfy.model_management.get_torch_device())
        options = {"dtype": dtype}
        twin = comfy.sd.load_diffusion_model_state_dict(sd, model_options=options, disable_dynamic=disable_dynamic)
        twin.cached_patcher_init = (load_twin, ())  # as ComfyUI's loaders do, for copies
        return twin

    pair = load_flux(str(path), "16bit"), load_twin()
    assert {model.model.get_dtype_inference() for model in pair} == {dtype}
    return pair


@functools.cache
def _make_env(folder: Path) -> SimpleNamespace:
    import comfy.sd
    import comfy.utils

    import nodes
    from svdq.cli.synth import synth
    from svdq.loaders.demo_assets import demo_prompt_embedding, write_demo_vae

    folder.mkdir()

    @functools.cache
    def pair(variant: str) -> tuple[Any, Any]:
        path = folder / f"{variant}.safetensors"
        synth(path, variant=variant, scale="tiny", seed=len(list(folder.iterdir())))
        models = load_pair(path, torch.float32)
        if models[0].load_device.type == "cuda":
            # The first pass of a process differs from all later ones in the last bits (see forward).
            forward(models[0], inputs(open_checkpoint(path)))
        return models

    @functools.cache
    def plain(variant: str) -> torch.Tensor:
        return sample(pair(variant)[0], env)

    def conditioning(text: str) -> list:
        pair("dev")
        config = open_checkpoint(folder / "dev.safetensors").config
        context, pooled = demo_prompt_embedding(text, config.context_in_dim, config.vec_in_dim)
        return [[context, {"pooled_output": pooled, "guidance": 3.5}]]

    write_demo_vae(folder / "vae.safetensors")
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(folder / "vae.safetensors")))
    generator = torch.Generator().manual_seed(11)
    env = SimpleNamespace(
        folder=folder,
        pair=pair,
        plain=plain,
        prompt=conditioning("a red square"),
        other=conditioning("a blue circle"),
        vae=vae,
        image=torch.rand(1, 64, 64, 3, generator=generator),
        mask=(torch.arange(64) < 32).float().expand(1, 64, 64),
        latent={"samples": torch.randn(1, 16, 8, 8, generator=generator) * 0.2},
        nodes=nodes,
    )
    return env


# ---- nodes


def node(module: str, name: str, *arguments: Any, **inputs: Any) -> Any:
    """Run a node of comfy_extras and return its outputs; a single one as itself."""
    kind = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), name)
    if hasattr(kind, "define_schema"):
        outputs = kind.execute(*arguments, **inputs).args
    else:
        outputs = getattr(kind(), kind.FUNCTION)(*arguments, **inputs)
    return outputs[0] if len(outputs) == 1 else outputs


def sample(model: Any, env: SimpleNamespace, positive: list | None = None, **options: Any) -> torch.Tensor:
    """Two steps of KSampler."""
    settings = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0} | options
    latent = settings.pop("latent", env.latent)
    negative = settings.pop("negative", env.other)
    (out,) = env.nodes.common_ksampler(
        model, 7, settings.pop("steps", 2), settings.pop("cfg"), settings.pop("sampler_name"),
        settings.pop("scheduler"), positive or env.prompt, negative, latent, **settings,
    )  # fmt: skip
    return out["samples"]


def run_guider(guider: Any, env: SimpleNamespace, model: Any) -> torch.Tensor:
    """Two steps of SamplerCustomAdvanced."""
    sigmas = node("custom_sampler", "BasicScheduler", model, "simple", 2, 1.0)
    noise = node("custom_sampler", "RandomNoise", 7)
    sampler = node("custom_sampler", "KSamplerSelect", "euler")
    return node("custom_sampler", "SamplerCustomAdvanced", noise, guider, sampler, sigmas, env.latent)[0]["samples"]


# ---- the check


def check(name: str, env: SimpleNamespace) -> None:
    """The same latent as the dense model, another one than without the case, and nothing left behind."""
    case = CASES[name]
    quantized, dense = env.pair(case.variant)
    before = env.plain(case.variant)
    actual, expected = case.run(quantized, env), case.run(dense, env)
    assert torch.isfinite(actual).all()
    error = relative(actual, expected)
    assert error <= case.limit, f"{error:.3g} from the dense model"
    if not case.changes:
        assert relative(actual, before) <= case.limit, "what should change nothing does"
    elif actual.shape == before.shape:
        assert relative(actual, before) > max(1e-3, 10 * error), "the node changes nothing"
    assert torch.equal(sample(quantized, env), before), "something of the node stays behind"
