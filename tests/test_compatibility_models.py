"""Merges, copies, compilation and devices, on the quantized model and on its dense twin: the same latent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import compatibility_env
import pytest
import torch
from compatibility_env import LIMIT, ROUNDED_LIMIT, case, check, names, node, sample
from flux_models import relative
from lora_files import FAMILIES, LAYERS, lora_file, with_lora

pytestmark = pytest.mark.comfy

env, float32 = compatibility_env.env, compatibility_env.float32  # fixtures


@case("ModelMergeSimple with a 16-bit model", limit=ROUNDED_LIMIT)
def _(model, env):
    return sample(node("model_merging", "ModelMergeSimple", model, env.pair("krea")[1], 0.5), env)


@case("ModelMergeFlux1 with another quantized model, changed blocks", limit=ROUNDED_LIMIT)
def _(model, env):
    other = env.pair("krea")[0]
    ratios = {"double_blocks.0.": 0.2, "single_blocks.1.": 0.7}
    return sample(node("model_merging_model_specific", "ModelMergeFlux1", model, other, **ratios), env)


@case("Merged weights and MLP biases of quantized layers alone")
def _(model, env):
    merged = model.clone()
    other = env.pair("krea")[0].get_key_patches("diffusion_model.")
    for key, value in other.items():
        if "_blocks." in key and "norm" not in key and key.endswith((".weight", "mlp.2.bias", "linear2.bias")):
            assert merged.add_patches({key: value}, 0.3, 0.7)
    return sample(merged, env)


@case("ModelMergeSimple with itself", limit=ROUNDED_LIMIT, changes=False)
def _(model, env):
    return sample(node("model_merging", "ModelMergeSimple", model, model, 0.5), env)


@case("ModelMergeFlux1 with a 16-bit model, and a LoRA on both", limit=ROUNDED_LIMIT)
def _(model, env):
    other = with_lora(env.pair("krea")[1], lora_file(env, seed=3), 0.4)
    ratios = {"double_blocks.1.": 0.6, "single_blocks.0.": 0.3, "img_in.": 0.5, "final_layer.": 0.8}
    merged = node("model_merging_model_specific", "ModelMergeFlux1", with_lora(model, lora_file(env)), other, **ratios)
    return sample(with_lora(merged, lora_file(env, seed=4), 0.3), env)


@case("ModelMergeSubtract, then ModelMergeAdd", limit=ROUNDED_LIMIT)
def _(model, env):
    difference = node("model_merging", "ModelSubtract", env.pair("krea")[1], env.pair("dev")[1], 0.5)
    return sample(node("model_merging", "ModelAdd", model, difference), env)


@case("16-bit model merged with this one", limit=ROUNDED_LIMIT)
def _(model, env):
    return sample(node("model_merging", "ModelMergeSimple", env.pair("krea")[1], model, 0.5), env)


# ---- copies and devices


@contextmanager
def two_devices(model) -> Iterator[tuple[object, list[torch.device]]]:
    """(another copy of the model, devices that are two to ComfyUI and one to PyTorch).

    Split models are cycles of references. ComfyUI's cache holds what they were made of; here that goes with them, so
    that it must not be the model of other tests.
    """
    import comfy.model_management as management

    if model.load_device.type != "cpu":
        pytest.skip("two devices that are one: only a CPU can do that")
    management.cleanup_models_gc()
    devices = [torch.device("cpu"), torch.device("cpu", 1)]
    load, arguments = model.cached_patcher_init
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(management, "get_all_torch_devices", lambda exclude_current=False: devices)
        yield load(*arguments), devices


def sample_on_both(split, env, positive=None) -> torch.Tensor:
    """Sample with two conditionings, and see that each device computes one of them in each step."""
    (copy,) = split.get_additional_models_with_key("multigpu")
    assert copy.model is not split.model and copy.load_device != split.load_device
    batches: list[tuple[int, int]] = []  # which model, how many conditionings

    def seen(flux: torch.nn.Module, arguments: tuple) -> None:
        batches.append((id(flux), len(arguments[0])))

    models = [patcher.model.diffusion_model for patcher in (copy, split)]
    hooks = [model.register_forward_pre_hook(seen) for model in models]
    try:
        latent = sample(split, env, positive, cfg=2.0)
    finally:
        for hook in hooks:
            hook.remove()
    assert sorted(batches) == sorted([(id(model), 1) for model in models] * 2), "two steps, one for each in both"
    return latent


@case("torch.compile of a block as TorchCompileModel does it (backend eager), with a LoRA")
def _(model, env):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    # The node compiles the whole model with inductor or as CUDA graphs: minutes, or a GPU.
    compiled = with_lora(model, lora_file(env)).clone(disable_dynamic=True)
    set_torch_compile_wrapper(model=compiled, backend="eager", keys=["diffusion_model.single_blocks.1"])
    try:
        return sample(compiled, env)
    finally:
        torch._dynamo.reset()


@case("SelectModelDevice: cpu, after a LoRA")
def _(model, env):
    return sample(node("multigpu", "SelectModelDeviceNode", with_lora(model, lora_file(env)), "cpu"), env)


@case("MultiGPU CFG Split: two devices, a LoRA and a hook")
def _(model, env):
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora_file(env, seed=5), 0.5, 0.0)
    positive = node("hooks", "ConditioningSetProperties", env.prompt, 1.0, "default", hooks=hooks)
    with two_devices(model) as (model, _):
        split = node("multigpu", "MultiGPUCFGSplitNode", with_lora(model, lora_file(env)), 2)
        return sample_on_both(split, env, positive)


@case("MultiGPU CFG Split before the LoRA, whose strength then changes")
def _(model, env):
    with two_devices(model) as (model, _):
        split = node("multigpu", "MultiGPUCFGSplitNode", model, 2)
        strong, weak = (sample_on_both(with_lora(split, lora_file(env), strength), env) for strength in (0.9, 0.3))
        assert relative(weak, strong) > 1e-3
        assert relative(sample_on_both(split, env), weak) > 1e-3
    return weak


@case("MultiGPU CFG Split: another run takes the copy that is loaded")
def _(model, env):
    with two_devices(model) as (model, _):
        first = node("multigpu", "MultiGPUCFGSplitNode", model, 2)
        before = sample_on_both(first, env)
        again = node("multigpu", "MultiGPUCFGSplitNode", with_lora(model, lora_file(env)), 2)
        copies = [split.get_additional_models_with_key("multigpu")[0].model for split in (first, again)]
        assert copies[0] is copies[1]
        latent = sample_on_both(again, env)
        assert torch.equal(sample_on_both(first, env), before)
    return latent


@case("SelectModelDevice: an independent copy on another device, and back")
def _(model, env):
    from comfy_extras import nodes_multigpu

    with two_devices(model) as (model, (here, there)):
        patched = with_lora(model, lora_file(env))
        # The node itself takes any CPU for the one that needs no copy.
        moved = nodes_multigpu._retarget_patcher(patched.clone(), there, here)
        assert moved.model is not model.model and moved.load_device == there
        latent = sample(moved, env)
        back = nodes_multigpu._retarget_patcher(moved.clone(), here, here)
        assert torch.equal(sample(back, env), latent)
    return latent


@case("A second, independent copy of the model (clone with force_deepcopy)")
def _(model, env):
    return sample(with_lora(model, lora_file(env)).clone(force_deepcopy=True), env)


# ---- the test


@pytest.mark.parametrize("name", names(__name__))
def test_same_latent_as_the_dense_model(name: str, env: SimpleNamespace) -> None:
    check(name, env)


def test_patches_without_effect(env: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges at a ratio of 1 and hooks at strength 0 leave layers to their kernels: the same bits with INT4"""
    import comfy.hooks

    from svdq.model import load_flux

    krea = env.pair("krea")[0]
    monkeypatch.setenv("SVDQ_BACKEND", "int4-reference")
    model = load_flux(str(env.folder / "dev.safetensors"))
    expected = sample(model, env)
    assert not torch.equal(expected, env.plain("dev"))
    assert torch.equal(sample(node("model_merging", "ModelMergeSimple", model, krea, 1.0), env), expected)
    hooks = comfy.hooks.create_hook_lora(lora_file(env, FAMILIES["LoHa"]), 0.0, 0.0)
    positive = node("hooks", "ConditioningSetProperties", env.prompt, 1.0, "default", hooks=hooks)
    assert torch.equal(sample(model, env, positive), expected)


@pytest.mark.parametrize("form", ["standard", "full_diff"])
def test_extracted_loras(form: str, env: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extract and Save Lora of ModelSubtract: the LoRA that was added, as with a 16-bit model"""
    import folder_paths
    from comfy_extras.nodes_lora_extract import LoraSave
    from safetensors.torch import load_file

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    found = []
    for number, model in enumerate(env.pair("dev")):
        tuned = with_lora(model, lora_file(env, FAMILIES["LoRA with bias"]), 0.7)
        difference = node("model_merging", "ModelSubtract", tuned, model, 1.0)
        LoraSave.execute(f"{number}", 8, form, True, model_diff=difference)
        (path,) = tmp_path.glob(f"{number}_*")
        found.append(load_file(path))
    quantized, dense = found
    assert quantized.keys() == dense.keys()
    for name in LAYERS:
        up, down = (f"diffusion_model.{name}.lora_{leaf}.weight" for leaf in ("up", "down"))
        key = f"diffusion_model.{name}.diff"
        deltas = [file[key] if form == "full_diff" else file[up].float() @ file[down].float() for file in found]
        assert deltas[1].std() > 1e-4
        assert relative(*deltas) < 2e-3, name  # files are in float16
        biases = [file[f"diffusion_model.{name}.diff_b"].float() for file in found]
        assert biases[1].std() > 0.01
        assert relative(*biases) < 1e-2, name  # ComfyUI rounds what it adds to a bias to 16 bits


def test_what_nodes_see_of_a_model_that_is_not_loaded(env: SimpleNamespace) -> None:
    # ComfyUI asks for each parameter of a layer that is off the GPU, and for all of those on it: dense either way.
    quantized, dense = (with_lora(model, lora_file(env, FAMILIES["LoHa"]), 0.7) for model in env.pair("dev"))
    for model in (quantized, dense):
        model.unpatch_model()
    states, device = quantized.model_state_dict(filter_prefix="diffusion_model."), torch.device("cpu")
    for name in LAYERS:
        key = f"diffusion_model.{name}.weight"
        expected = dense.patch_weight_to_device(key, device, return_weight=True)
        assert relative(quantized.patch_weight_to_device(key, device, return_weight=True), expected) < LIMIT
        assert relative(states[key], expected) < LIMIT
        assert states[key].shape == expected.shape and f"{key}_scale" in states
    assert states["diffusion_model.img_in.weight"].dtype == torch.bfloat16
    assert quantized.model_state_dict()[key].dtype == torch.int8, "core sums up what is stored"
