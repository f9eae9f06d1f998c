"""Stock nodes and the hooks that other packs use, on the quantized model and on its dense twin: the same latent.

Each case samples two steps with both models, in this process, through ComfyUI's own nodes. A case also has to change
something against plain sampling, so that a node that was silently ignored does not pass.

Both compute in float32, on a GPU too: in bf16 some nodes amplify rounding (CFG 3 to 0.02, a DoRA to 0.1 on an H200),
and no limit could tell that from a mistake. One case runs on a GPU in bf16.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flux_models import dense_state_dict, forward, inputs, relative

from svdq.loaders import open_checkpoint

pytestmark = [pytest.mark.comfy]

LIMIT = 1e-5  # float32: both models compute the same numbers, LoRA in another order
BIAS_LIMIT = 1e-3  # core rounds a changed bias to 16 bits; the dense twin's are float32
MERGE_LIMIT = 1e-2  # core rounds all merged 16-bit layers
BF16_LIMIT = 2e-2

Case = Callable[[Any, SimpleNamespace], torch.Tensor]
CASES: dict[str, tuple[str, Case]] = {}  # name -> (variant of the model, case)


def case(name: str, variant: str = "dev") -> Callable[[Case], Case]:
    def register(function: Case) -> Case:
        CASES[name] = (variant, function)
        return function

    return register


@pytest.fixture(scope="module")
def float32(comfy) -> Iterator[None]:
    """What ComfyUI's --force-fp32 does, for this file's tests: 16-bit weights are cast to float32 for use, as on a CPU.
    (--fp32-unet would do nothing: a loader that names a type does not ask for it.)"""
    from comfy import model_management

    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = [backend.allow_tf32 for backend in backends]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_management, "FORCE_FP32", True)
        patch.setattr(model_management, "LORA_COMPUTE_DTYPES", {})  # else the type that the first LoRA was computed in
        for backend in backends:
            backend.allow_tf32 = False
        yield
    for backend, allow in zip(backends, allowed, strict=True):
        backend.allow_tf32 = allow


def load_pair(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """(quantized, dense twin) of a checkpoint; both have to compute in ``dtype``."""
    import comfy.model_management
    import comfy.sd

    from svdq.model import load_flux

    sd = dense_state_dict(open_checkpoint(path), dtype, comfy.model_management.get_torch_device())
    pair = load_flux(str(path), "16bit"), comfy.sd.load_diffusion_model_state_dict(sd, model_options={"dtype": dtype})
    assert {model.model.get_dtype_inference() for model in pair} == {dtype}
    return pair


@pytest.fixture(scope="module")
def env(float32, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Models by variant (quantized, dense), a conditioning for them, a VAE, and shorthands for nodes."""
    import comfy.sd
    import comfy.utils

    import nodes
    from svdq.cli.synth import synth
    from svdq.loaders.demo_assets import demo_prompt_embedding, write_demo_vae

    folder = tmp_path_factory.mktemp("compatibility")
    models: dict[str, tuple[Any, Any]] = {}

    def pair(variant: str) -> tuple[Any, Any]:
        if variant not in models:
            path = folder / f"{variant}.safetensors"
            synth(path, variant=variant, scale="tiny", seed=len(models))
            models[variant] = load_pair(path, torch.float32)
            if len(models) == 1 and models[variant][0].load_device.type == "cuda":
                # The first pass of a process differs from all later ones in the last bits (see forward).
                forward(models[variant][0], inputs(open_checkpoint(path)))
        return models[variant]

    def conditioning(text: str) -> list:
        pair("dev")
        config = open_checkpoint(folder / "dev.safetensors").config
        context, pooled = demo_prompt_embedding(text, config.context_in_dim, config.vec_in_dim)
        return [[context, {"pooled_output": pooled, "guidance": 3.5}]]

    write_demo_vae(folder / "vae.safetensors")
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(folder / "vae.safetensors")))
    generator = torch.Generator().manual_seed(11)
    return SimpleNamespace(
        folder=folder,
        pair=pair,
        prompt=conditioning("a red square"),
        other=conditioning("a blue circle"),
        vae=vae,
        image=torch.rand(1, 64, 64, 3, generator=generator),
        mask=(torch.arange(64) < 32).float().expand(1, 64, 64),
        latent={"samples": torch.randn(1, 16, 8, 8, generator=generator) * 0.2},
        nodes=nodes,
    )


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
        model, 7, 2, settings.pop("cfg"), settings.pop("sampler_name"), settings.pop("scheduler"),
        positive or env.prompt, negative, latent, **settings,
    )  # fmt: skip
    return out["samples"]


def run_guider(guider: Any, env: SimpleNamespace, model: Any) -> torch.Tensor:
    sigmas = node("custom_sampler", "BasicScheduler", model, "simple", 2, 1.0)
    noise = node("custom_sampler", "RandomNoise", 7)
    sampler = node("custom_sampler", "KSamplerSelect", "euler")
    return node("custom_sampler", "SamplerCustomAdvanced", noise, guider, sampler, sigmas, env.latent)[0]["samples"]


# ---- samplers and guiders


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


# ---- conditioning


@case("Conditioning (Combine)")
def _(model, env):
    return sample(model, env, [*env.prompt, *env.other])


@case("Conditioning (Set Mask): regional prompts")
def _(model, env):
    set_mask = env.nodes.ConditioningSetMask().append
    left = set_mask(env.prompt, env.mask, "default", 1.0)[0]
    right = set_mask(env.other, 1 - env.mask, "default", 1.0)[0]
    return sample(model, env, [*left, *right])


@case("Conditioning timestep ranges")
def _(model, env):
    set_range = env.nodes.ConditioningSetTimestepRange().set_range
    return sample(model, env, [*set_range(env.prompt, 0.0, 0.3)[0], *set_range(env.other, 0.3, 1.0)[0]])


@case("Attention mask on the text")
def _(model, env):
    context, extra = env.prompt[0]
    tokens = context.shape[1]
    mask = torch.zeros(1, tokens + 16, tokens + 16)
    mask[:, :, : tokens // 2] = -10.0
    return sample(model, env, [[context, extra | {"attention_mask": mask, "attention_mask_img_shape": (4, 4)}]])


@case("Latent noise mask")
def _(model, env):
    return sample(model, env, latent=env.latent | {"noise_mask": env.mask[:, None]})


@case("DifferentialDiffusion")
def _(model, env):
    gradient = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    return sample(node("differential_diffusion", "DifferentialDiffusion", model), env,
                  latent=env.latent | {"noise_mask": gradient})  # fmt: skip


@case("Kontext: ReferenceLatent", "kontext")
def _(model, env):
    return sample(model, env, node("edit_model", "ReferenceLatent", env.prompt, env.latent))


@case("Kontext: two references, each method", "kontext")
def _(model, env):
    positive = node("edit_model", "ReferenceLatent", env.prompt, env.latent)
    positive = node("edit_model", "ReferenceLatent", positive, {"samples": env.latent["samples"].flip(-1)})
    out = []
    for method in ("offset", "index", "uxo/uno"):  # index_timestep_zero fails in ComfyUI 0.30.0 with any FLUX.1
        chosen = node("flux", "FluxKontextMultiReferenceLatentMethod", positive, method)
        out.append(sample(model, env, chosen))
    assert not torch.equal(out[0], out[1])
    return torch.cat(out)


@case("Fill: InpaintModelConditioning", "fill")
def _(model, env):
    positive, negative, latent = env.nodes.InpaintModelConditioning().encode(
        env.prompt, env.other, env.image, env.vae, env.mask
    )
    return sample(model, env, positive, negative=negative, latent=latent)


@case("Canny, Depth: InstructPixToPixConditioning", "canny")
def _(model, env):
    positive, negative, latent = node(
        "ip2p", "InstructPixToPixConditioning", env.prompt, env.other, env.image, env.vae
    )
    return sample(model, env, positive, negative=negative, latent=latent)


@case("ControlNet (InstantX form), twice at once")
def _(model, env):
    import comfy.controlnet
    import comfy.latent_formats
    import comfy.ldm.flux.controlnet
    import comfy.ops

    config = dict(model.model.model_config.unet_config)
    positive, negative = env.prompt, env.other
    for seed in (1, 2):
        network = comfy.ldm.flux.controlnet.ControlNetFlux(
            latent_input=True, control_latent_channels=16, operations=comfy.ops.manual_cast,
            **(config | {"depth": 1, "depth_single_blocks": 1, "dtype": torch.float32}),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        control = comfy.controlnet.ControlNet(
            network.requires_grad_(False), compression_ratio=1, latent_format=comfy.latent_formats.Flux(),
            load_device=model.load_device, extra_conds=["y", "guidance"],
        )  # fmt: skip
        positive, negative = env.nodes.ControlNetApplyAdvanced().apply_controlnet(
            positive, negative, control, env.image, 0.8, 0.0, 1.0, vae=env.vae
        )
    return sample(model, env, positive, negative=negative)


# ---- model patches, as other packs use them


@case('patches_replace["dit"], double and single block')
def _(model, env):
    model = model.clone()

    def replace(arguments: dict, extra: dict) -> dict:
        out = extra["original_block"](arguments)
        return {name: value * 1.05 for name, value in out.items()}

    model.set_model_patch_replace(replace, "dit", "double_block", 0)
    model.set_model_patch_replace(replace, "dit", "single_block", 1)
    return sample(model, env)


@case("attn1_patch and attn1_output_patch")
def _(model, env):
    model = model.clone()
    model.set_model_attn1_patch(lambda q, k, v, pe, attn_mask, extra_options: {"q": q * 1.1, "v": v * 0.9})
    model.set_model_attn1_output_patch(lambda attention, extra_options: attention * 1.1)
    return sample(model, env)


@case("post_input patch")
def _(model, env):
    model = model.clone()
    model.set_model_post_input_patch(lambda arguments: arguments | {"img": arguments["img"] * 1.1})
    return sample(model, env)


@case("DIFFUSION_MODEL wrapper")
def _(model, env):
    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    model.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "test", lambda executor, *args, **kwargs: executor(*args, **kwargs) * 1.05
    )
    return sample(model, env)


@case("optimized_attention_override")
def _(model, env):
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda original, *args, **kwargs: original(*args, **kwargs) * 1.1
    )
    return sample(model, env)


@case("EasyCache")
def _(model, env):
    return run_guider(node("custom_sampler", "CFGGuider", node("easycache", "EasyCacheNode", model, 5.0, 0.0, 1.0,
                      False), env.prompt, env.other, 2.0), env, model)  # fmt: skip


@case("LazyCache")
def _(model, env):
    return sample(node("easycache", "LazyCacheNode", model, 5.0, 0.0, 1.0, False), env, cfg=2.0)


@case("SkipLayerGuidanceDiT")
def _(model, env):
    return sample(node("slg", "SkipLayerGuidanceDiT", model, 3.0, 0.0, 1.0, "0", "1"), env, cfg=2.0)


@case("NAGuidance")
def _(model, env):
    return sample(node("nag", "NAGuidance", model, 5.0, 0.5, 1.5), env, cfg=2.0)


@case("CFGZeroStar")
def _(model, env):
    return sample(node("cfg", "CFGZeroStar", model), env, cfg=3.0)


@case("ModelMergeSimple with the 16-bit model")
def _(model, env):
    return sample(node("model_merging", "ModelMergeSimple", model, env.pair("kontext")[1], 0.5), env)


@case("ModelMergeFlux1 with itself, changed blocks")
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


# ---- LoRA families, by the keys that files have

LAYERS = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.1.txt_mlp.2",
    "double_blocks.0.img_mod.lin",
    "single_blocks.0.linear1",
    "single_blocks.1.linear2",
)


def adapter(env: SimpleNamespace, build: Callable[..., dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A LoRA file with one adapter on every kind of layer; build(random, n, k) gives its tensors by suffix."""
    generator = torch.Generator().manual_seed(17)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    flux = env.pair("dev")[0].model.diffusion_model
    tensors = {}
    for name in LAYERS:
        n, k = flux.get_parameter(f"{name}.weight").shape
        tensors |= {f"diffusion_model.{name}.{suffix}": value for suffix, value in build(random, n, k).items()}
    return tensors


def _lora(random, n, k):
    return {"lora_down.weight": random(8, k, scale=k**-0.5), "lora_up.weight": random(n, 8, scale=0.2),
            "alpha": torch.tensor(4.0)}  # fmt: skip


FAMILIES: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "LoRA": _lora,
    "DoRA": lambda random, n, k: _lora(random, n, k) | {"dora_scale": random(n, 1).abs() + 0.5},
    "LoHa": lambda random, n, k: {
        "hada_w1_a": random(n, 4, scale=0.3), "hada_w1_b": random(4, k, scale=0.3),
        "hada_w2_a": random(n, 4, scale=0.3), "hada_w2_b": random(4, k, scale=0.3), "alpha": torch.tensor(4.0),
    },
    "LoKr": lambda random, n, k: {"lokr_w1": random(4, 4), "lokr_w2": random(n // 4, k // 4, scale=0.02)},
    "full difference": lambda random, n, k: {"diff": random(n, k, scale=0.02)},
    "set": lambda random, n, k: {"set_weight": random(n, k, scale=k**-0.5)},
    "bias difference": lambda random, n, k: {"diff_b": random(n, scale=0.1)},
    "LoRA with bias": lambda random, n, k: _lora(random, n, k) | {"diff_b": random(n, scale=0.1)},
}  # fmt: skip

for _name, _build in FAMILIES.items():

    @case(f"LoraLoaderModelOnly: {_name}")
    def _(model, env, build=_build):
        import comfy.sd

        return sample(comfy.sd.load_lora_for_models(model, None, adapter(env, build), 0.8, 0)[0], env)


@case("Two LoRAs, one twice, negative strength")
def _(model, env):
    import comfy.sd

    for build, strength in ((_lora, 0.7), (FAMILIES["LoHa"], -0.5), (_lora, 0.2)):
        model = comfy.sd.load_lora_for_models(model, None, adapter(env, build), strength, 0)[0]
    return sample(model, env)


# ---- the test


def test_the_page_lists_these_cases() -> None:
    """docs/compatibility.md is this list; write what the failure shows."""
    page = (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert [line[2:] for line in page.splitlines() if line.startswith("- ")] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_same_latent_as_the_dense_model(name: str, env: SimpleNamespace) -> None:
    variant, function = CASES[name]
    quantized, dense = env.pair(variant)
    before = sample(quantized, env)
    actual, expected = function(quantized, env), function(dense, env)
    limit = LIMIT
    if name.startswith("ModelMerge"):
        limit = MERGE_LIMIT
    elif name.endswith(("bias difference", "with bias")):
        limit = BIAS_LIMIT
    assert torch.isfinite(actual).all()
    assert relative(actual, expected) <= limit
    if actual.shape == before.shape:
        assert relative(actual, before) > 1e-3, "the node changes nothing"
    assert torch.equal(sample(quantized, env), before), "something of the node stays behind"


@pytest.mark.gpu
def test_same_latent_in_bf16(env: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA on both models in the type that a GPU computes in, the file's."""
    from comfy import model_management

    monkeypatch.setattr(model_management, "FORCE_FP32", False)
    monkeypatch.setattr(model_management, "LORA_COMPUTE_DTYPES", {})
    quantized, dense = load_pair(env.folder / "dev.safetensors", torch.bfloat16)
    _, function = CASES["LoraLoaderModelOnly: LoRA"]
    assert relative(function(quantized, env), function(dense, env)) <= BF16_LIMIT
