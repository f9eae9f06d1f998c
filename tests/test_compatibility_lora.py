"""LoRAs of every kind and naming, and LoRA hooks, on the quantized model and on its dense twin: the same latent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import compatibility_env
import pytest
import torch
from compatibility_env import BIAS_LIMIT, LIMIT, ROUNDED_LIMIT, case, check, names, node, sample
from lora_files import (
    FAMILIES,
    LAYERS,
    NAMINGS,
    PLAIN_LAYERS,
    bfl_control_lora,
    logged,
    lora_file,
    named_lora,
    with_lora,
)

pytestmark = pytest.mark.comfy

env, float32 = compatibility_env.env, compatibility_env.float32  # fixtures


# ---- kinds of adapters

for _name, _build in FAMILIES.items():
    _limit = BIAS_LIMIT if "bias" in _name else LIMIT

    @case(f"LoraLoaderModelOnly: {_name}", limit=_limit)
    def _(model, env, build=_build):
        return sample(with_lora(model, lora_file(env, build)), env)

    if "bias" not in _name:

        @case(f"LoraLoaderModelOnly: {_name}, on layers of 16 bits", limit=ROUNDED_LIMIT)
        def _(model, env, build=_build):
            return sample(with_lora(model, lora_file(env, build, PLAIN_LAYERS)), env)


@case("Two LoRAs, one twice, negative strength")
def _(model, env):
    for family, strength in (("LoRA", 0.7), ("LoHa", -0.5), ("LoRA", 0.2)):
        model = with_lora(model, lora_file(env, FAMILIES[family]), strength)
    return sample(model, env)


@case("Eight LoRAs of different kinds on the same layers", limit=BIAS_LIMIT)
def _(model, env):
    for seed, family in enumerate(("LoRA", "DoRA", "LoHa", "LoRA with bias", "LoKr", "GLoRA", "OFT", "LoRA")):
        model = with_lora(model, lora_file(env, FAMILIES[family], seed=seed), 0.3 if seed % 2 else -0.2)
    return sample(model, env)


@case("Forty LoRAs")
def _(model, env):
    for seed in range(40):
        model = with_lora(model, lora_file(env, seed=seed, layers=LAYERS[seed % 2 :: 2]), 0.1)
    return sample(model, env)


@case("LoRA files in fp16 and fp8")
def _(model, env):
    for seed, dtype in enumerate((torch.float16, torch.float8_e4m3fn)):
        model = with_lora(model, lora_file(env, seed=seed, dtype=dtype), 0.5)
    return sample(model, env)


# ---- namings

for _name in NAMINGS:

    @case(f"LoRA named as by {_name}")
    def _(model, env, naming=_name):
        with logged() as messages:
            patched = with_lora(model, named_lora(naming))
        # Keys of the blocks that only a whole FLUX has tell ComfyUI the form; it says that it does not use them.
        assert [message for message in messages if ".37." not in message and ".18." not in message] == []
        assert len(patched.patches) == len(set(patched.patches)) > 5
        return sample(patched, env)


@case("Canny or Depth as a LoRA that widens img_in", limit=ROUNDED_LIMIT)
def _(model, env):
    positive, negative, latent = node("ip2p", "InstructPixToPixConditioning", env.prompt, env.other, env.image, env.vae)
    with logged() as messages:
        patched = with_lora(model, bfl_control_lora())
    assert messages == []
    return sample(patched, env, positive, negative=negative, latent=latent)


# ---- other ways to a LoRA


@case("LoraLoaderBypassModelOnly: LoRA, LoHa, LoKr")  # OFT and GLoRA fail in ComfyUI 0.30.0 with any model
def _(model, env):
    import comfy.sd

    out = []
    for family in ("LoRA", "LoHa", "LoKr"):
        # Values that bf16 holds: the adapters get the type of the weight that they stand beside.
        lora = {key: value.bfloat16().float() for key, value in lora_file(env, FAMILIES[family]).items()}
        out.append(sample(comfy.sd.load_bypass_lora_for_models(model, None, lora, 0.8, 0)[0], env))
    assert not torch.equal(out[0], out[1])
    return torch.cat(out)


# ---- hooks


def hook_lora(env: SimpleNamespace, strength: float = 0.8, previous: Any = None, **options: Any) -> Any:
    """CreateHookLoraModelOnly, which reads a file, without the file."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora_file(env, **options), strength, 0.0)
    return hooks if previous is None else previous.clone_and_combine(hooks)


def hooked(env: SimpleNamespace, conditioning: list, hooks: Any, **options: Any) -> list:
    """ConditioningSetProperties."""
    settings = {"strength": 1.0, "set_cond_area": "default"} | options
    return node("hooks", "ConditioningSetProperties", conditioning, hooks=hooks, **settings)


def keyframes(*frames: tuple[float, float]) -> Any:
    """CreateHookKeyframe, one after the other: (strength, start)."""
    group = None
    for strength, start in frames:
        group = node("hooks", "CreateHookKeyframe", strength, start, prev_hook_kf=group)
    return group


@case("CreateHookLora on the positive conditioning")
def _(model, env):
    return sample(model, env, hooked(env, env.prompt, hook_lora(env)), cfg=2.0)


@case("CreateHookLora: two hooks of which one is not low rank, over a LoRA on the model")
def _(model, env):
    hooks = hook_lora(env, 0.5, hook_lora(env, -0.6, seed=3), build=FAMILIES["LoHa"], seed=4)
    return sample(with_lora(model, lora_file(env, seed=5), 0.4), env, hooked(env, env.prompt, hooks))


@case("Different hooks on positive and negative (PairConditioningSetProperties)")
def _(model, env):
    positive = hooked(env, env.prompt, hook_lora(env, seed=3))
    negative = hooked(env, env.other, hook_lora(env, seed=4, layers=LAYERS[1:4]))
    positive, negative = node(
        "hooks", "PairConditioningSetProperties", positive, negative, 1.0, "default", hooks=hook_lora(env, 0.3, seed=6)
    )
    return sample(model, env, positive, negative=negative, cfg=2.5)


@case("Hooks of regions (PairConditioningSetPropertiesAndCombine, masks)")
def _(model, env):
    first = node(
        "hooks", "PairConditioningSetProperties", env.prompt, env.other, 1.0, "default",
        mask=env.mask, hooks=hook_lora(env, seed=3),
    )  # fmt: skip
    positive, negative = node(
        "hooks", "PairConditioningSetPropertiesAndCombine", *first, env.other, env.prompt, 1.0, "default",
        mask=1 - env.mask, hooks=hook_lora(env, 0.6, seed=4),
    )  # fmt: skip
    return sample(model, env, positive, negative=negative, cfg=2.0)


@case("PairConditioningSetDefaultCombine with a hook")
def _(model, env):
    masked = node("hooks", "PairConditioningSetProperties", env.prompt, env.other, 1.0, "default", mask=env.mask)
    positive, negative = node(
        "hooks", "PairConditioningSetDefaultAndCombine", *masked, env.other, env.prompt, hooks=hook_lora(env)
    )
    return sample(model, env, positive, negative=negative, cfg=2.0)


@case("SetHookKeyframes: a strength that changes from step to step")
def _(model, env):
    frames = keyframes((1.0, 0.0), (0.3, 0.2), (0.0, 0.4), (-0.5, 0.7))
    hooks = node("hooks", "SetHookKeyframes", hook_lora(env), hook_kf=frames)
    return sample(model, env, hooked(env, env.prompt, hooks), steps=6)


@case("CreateHookKeyframesInterpolated and ...FromFloats, two hooks")
def _(model, env):
    eased = node("hooks", "CreateHookKeyframesInterpolated", 0.0, 1.0, "ease_in", 0.0, 1.0, 4)
    floats = node("hooks", "CreateHookKeyframesFromFloats", [0.2, 0.9, 0.4], 0.0, 1.0)
    hooks = node(
        "hooks", "CombineHooks",
        hooks_A=node("hooks", "SetHookKeyframes", hook_lora(env, seed=3), hook_kf=eased),
        hooks_B=node("hooks", "SetHookKeyframes", hook_lora(env, seed=4, build=FAMILIES["LoKr"]), hook_kf=floats),
    )  # fmt: skip
    return sample(model, env, hooked(env, env.prompt, hooks), steps=4)


@case("Hooks on a part of the steps (ConditioningTimestepsRange)")
def _(model, env):
    now, _, after = node("hooks", "ConditioningTimestepsRange", 0.0, 0.5)
    first = hooked(env, env.prompt, hook_lora(env, seed=3), timesteps=now)
    then = hooked(env, env.prompt, hook_lora(env, seed=4), timesteps=after)
    return sample(model, env, [*first, *then], steps=4)


@case("Hooks that keep no copies of weights (EnumHookMode.MinVram)")
def _(model, env):
    import comfy.hooks

    model = model.clone()
    model.set_hook_mode(comfy.hooks.EnumHookMode.MinVram)
    positive = hooked(env, env.prompt, hook_lora(env, seed=3))
    return sample(model, env, positive, negative=hooked(env, env.other, hook_lora(env, seed=4)), cfg=2.0)


@case("CreateHookModelAsLora: another model as a LoRA", limit=ROUNDED_LIMIT)
def _(model, env):
    import comfy.hooks

    weights = comfy.hooks.get_patch_weights_from_model(env.pair("krea")[1])
    hooks = comfy.hooks.create_hook_model_as_lora(weights, None, 0.4, 0.0)
    return sample(with_lora(model, lora_file(env), 0.3), env, hooked(env, env.prompt, hooks))


# ---- the test


@pytest.mark.parametrize("name", names(__name__))
def test_same_latent_as_the_dense_model(name: str, env: SimpleNamespace) -> None:
    check(name, env)
