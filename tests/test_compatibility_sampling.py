"""Samplers, guiders, sizes and previews, on the quantized model and on its dense twin: the same latent."""

from __future__ import annotations

from types import SimpleNamespace

import compatibility_env
import pytest
import torch
from compatibility_env import case, check, names, node, run_guider, sample
from lora_files import FAMILIES, LAYERS, lora_file, with_lora

pytestmark = pytest.mark.comfy

env, float32 = compatibility_env.env, compatibility_env.float32  # fixtures


@case("KSampler, CFG 3 with a negative prompt")
def _(model, env):
    return sample(model, env, cfg=3.0)


@case("KSampler, dpmpp_2m, beta scheduler")
def _(model, env):
    return sample(model, env, sampler_name="dpmpp_2m", scheduler="beta")


@case("KSampler, denoise 0.5 (image to image)")
def _(model, env):
    return sample(model, env, denoise=0.5)


@case("KSampler (Advanced), steps 1 to 2")
def _(model, env):
    return sample(model, env, start_step=1, last_step=2, force_full_denoise=True)


@case("SamplerCustom")
def _(model, env):
    sigmas = node("custom_sampler", "BasicScheduler", model, "simple", 3, 1.0)
    sampler = node("custom_sampler", "KSamplerSelect", "heun")
    return node(
        "custom_sampler", "SamplerCustom", model, True, 7, 1.0, env.prompt, env.other, sampler, sigmas, env.latent
    )[0]["samples"]


@case("SamplerCustomAdvanced, CFGGuider")
def _(model, env):
    return run_guider(node("custom_sampler", "CFGGuider", model, env.prompt, env.other, 2.0), env, model)


@case("DualCFGGuider")
def _(model, env):
    guider = node("custom_sampler", "DualCFGGuider", model, env.prompt, env.other, env.other, 2.0, 1.5, "regular")
    return run_guider(guider, env, model)


@case("PerpNegGuider")
def _(model, env):
    return run_guider(node("perpneg", "PerpNegGuider", model, env.prompt, env.other, env.other, 3.0, 1.0), env, model)


@case("FluxGuidance")
def _(model, env):
    return sample(model, env, node("flux", "FluxGuidance", env.prompt, 9.0))


@case("ModelSamplingFlux")
def _(model, env):
    return sample(node("model_advanced", "ModelSamplingFlux", model, 1.9, 0.9, 1024, 1024), env)


@case("Batch of 3")
def _(model, env):
    return sample(model, env, latent={"samples": env.latent["samples"].repeat(3, 1, 1, 1)})


@case("A size that is no multiple of the patch (120 x 72)")
def _(model, env):
    return sample(model, env, latent={"samples": torch.zeros(1, 16, 9, 15)})


@case("BasicGuider")
def _(model, env):
    return run_guider(node("custom_sampler", "BasicGuider", model, env.other), env, model)


@case("DualModelGuider: two LoRAs of one model")
def _(model, env):
    models = [with_lora(model, lora_file(env, FAMILIES["LoRA"], layers=[layer])) for layer in LAYERS[:2]]
    guider = node("custom_sampler", "DualModelGuider", models[0], env.prompt, 3.0, models[1], env.other)
    return run_guider(guider, env, model)


@case("FluxDisableGuidance")
def _(model, env):
    return sample(model, env, node("flux", "FluxDisableGuidance", env.prompt))


@case("KSampler (Advanced): the second sampler goes on where the first stopped", changes=False)
def _(model, env):
    half = sample(model, env, start_step=0, last_step=1)
    return sample(model, env, start_step=1, last_step=2, disable_noise=True, latent={"samples": half})


@case("Interrupted, and run again", changes=False)
def _(model, env):
    import comfy.model_management as management
    import comfy.sample

    noise = comfy.sample.prepare_noise(env.latent["samples"], 7)
    with pytest.raises(management.InterruptProcessingException):
        comfy.sample.sample(
            model, noise, 2, 1.0, "euler", "simple", env.prompt, env.other, env.latent["samples"],
            callback=lambda *_: management.interrupt_current_processing(True), disable_pbar=True,
        )  # fmt: skip
    return sample(model, env)


@case("Previews while sampling (latent2rgb)", changes=False)
def _(model, env):
    import comfy.utils
    import latent_preview
    from comfy.cli_args import args

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
        patch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: seen.append(preview))
        out = sample(model, env)
    assert len(seen) == 2 and all(preview is not None for preview in seen)
    return out


# ---- the test


@pytest.mark.parametrize("name", names(__name__))
def test_same_latent_as_the_dense_model(name: str, env: SimpleNamespace) -> None:
    check(name, env)
