"""LoRA files of random numbers: every kind of adapter, under every naming that ComfyUI maps for FLUX."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# One of each kind: SVDQuant with one part, with unsigned activations, AWQ, SVDQuant with two parts.
LAYERS = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.1.txt_mlp.2",
    "double_blocks.0.img_mod.lin",
    "single_blocks.0.linear1",
    "single_blocks.1.linear2",
)
PLAIN_LAYERS = ("img_in", "txt_in", "time_in.in_layer", "vector_in.out_layer", "final_layer.linear")  # 16 bits

Build = Callable[..., dict[str, Tensor]]


def _lora(random, n, k):
    return {"lora_down.weight": random(8, k, scale=k**-0.5), "lora_up.weight": random(n, 8, scale=0.2),
            "alpha": torch.tensor(4.0)}  # fmt: skip


def _loha(random, n, k):
    return {f"hada_{name}": random(*shape, scale=0.3)
            for name, shape in (("w1_a", (n, 4)), ("w1_b", (4, k)), ("w2_a", (n, 4)), ("w2_b", (4, k)))
            } | {"alpha": torch.tensor(4.0)}  # fmt: skip


# Name -> tensors of one layer of shape [n, k] by suffix. Core reads OFT's and BOFT's alpha as a constraint.
FAMILIES: dict[str, Build] = {
    "LoRA": _lora,
    "LoRA without alpha": lambda random, n, k: {
        "lora_A.weight": random(4, k, scale=k**-0.5), "lora_B.weight": random(n, 4, scale=0.2),
    },
    "DoRA": lambda random, n, k: _lora(random, n, k) | {"dora_scale": random(n, 1).abs() + 0.5},
    "LoHa": _loha,
    "LoHa with DoRA": lambda random, n, k: _loha(random, n, k) | {"dora_scale": random(n, 1).abs() + 0.5},
    "LoKr": lambda random, n, k: {"lokr_w1": random(4, 4), "lokr_w2": random(n // 4, k // 4, scale=0.02)},
    "LoKr, both factors decomposed": lambda random, n, k: {
        "lokr_w1_a": random(4, 2), "lokr_w1_b": random(2, 4),
        "lokr_w2_a": random(n // 4, 2, scale=0.1), "lokr_w2_b": random(2, k // 4, scale=0.1),
        "alpha": torch.tensor(1.0),
    },
    "GLoRA": lambda random, n, k: {
        "a1.weight": random(k, 4, scale=0.05), "a2.weight": random(4, k, scale=0.05),
        "b1.weight": random(n, 4, scale=0.1), "b2.weight": random(4, k, scale=0.1), "alpha": torch.tensor(4.0),
    },
    "OFT": lambda random, n, k: {"oft_blocks": random(n // 32, 32, 32, scale=0.02), "alpha": torch.tensor(0.5)},
    "OFT with rescale": lambda random, n, k: {
        "oft_blocks": random(n // 32, 32, 32, scale=0.02), "rescale": random(n, 1).abs(), "alpha": torch.tensor(0.0),
    },
    "BOFT": lambda random, n, k: {
        "oft_blocks": random(2, n // 32, 32, 32, scale=0.02), "alpha": torch.tensor(0.5),
    },
    "full difference": lambda random, n, k: {"diff": random(n, k, scale=0.02)},
    "set": lambda random, n, k: {"set_weight": random(n, k, scale=k**-0.5)},
    "bias difference": lambda random, n, k: {"diff_b": random(n, scale=0.1)},
    "LoRA with bias": lambda random, n, k: _lora(random, n, k) | {"diff_b": random(n, scale=0.1)},
}  # fmt: skip


def lora_file(
    env: SimpleNamespace, build: Build = _lora, layers: Sequence[str] = LAYERS, seed: int = 17,
    prefix: str = "diffusion_model.", dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:  # fmt: skip
    """One adapter on each of ``layers``, under ComfyUI's own names unless ``prefix`` says otherwise."""
    flux = env.pair("dev")[0].model.diffusion_model
    draw, tensors = drawer(seed), {}
    for name in layers:
        parts = build(draw, *flux.get_parameter(f"{name}.weight").shape)
        tensors |= {f"{prefix}{name}.{suffix}": value.to(dtype) for suffix, value in parts.items()}
    return tensors


def drawer(seed: int) -> Callable[..., Tensor]:
    """random(*shape, scale): seeded normal numbers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return random


def with_lora(model: Any, lora: dict[str, Tensor], strength: float = 0.8) -> Any:
    """What LoraLoaderModelOnly does."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


# ---- namings


def _kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


_DIFFUSERS = {
    "transformer_blocks.0.attn.to_k": (256, 256),
    "transformer_blocks.0.attn.to_out.0": (256, 256),
    "transformer_blocks.0.attn.add_q_proj": (256, 256),
    "transformer_blocks.1.attn.to_add_out": (256, 256),
    "transformer_blocks.0.ff.net.0.proj": (1024, 256),
    "transformer_blocks.1.ff_context.net.2": (256, 1024),
    "transformer_blocks.0.norm1.linear": (1536, 256),
    "single_transformer_blocks.0.attn.to_v": (256, 256),
    "single_transformer_blocks.0.proj_mlp": (1024, 256),
    "single_transformer_blocks.1.proj_out": (256, 1280),
    "single_transformer_blocks.1.norm.linear": (768, 256),
}
_STOCK = {
    "double_blocks.0.img_attn.qkv": (768, 256),
    "double_blocks.1.txt_mlp.2": (256, 1024),
    "double_blocks.0.txt_mod.lin": (1536, 256),
    "single_blocks.0.linear1": (1792, 256),
    "single_blocks.1.linear2": (256, 1280),
    "single_blocks.1.modulation.lin": (768, 256),
}
_XLABS = {
    "double_blocks.0.processor.qkv_lora1": (768, 256),
    "double_blocks.1.processor.qkv_lora2": (768, 256),
    "double_blocks.0.processor.proj_lora1": (256, 256),
    "double_blocks.1.processor.proj_lora2": (256, 256),
    "single_blocks.0.processor.qkv_lora": (768, 256),
    "single_blocks.1.processor.proj_lora": (256, 1280),
}

KOHYA, PEFT = ("lora_down.weight", "lora_up.weight", "alpha"), ("lora_A.weight", "lora_B.weight", None)
# Naming -> (layers, name in the file, suffixes of down, up and alpha)
NAMINGS: dict[str, tuple[dict[str, tuple[int, int]], Callable[[str], str], tuple[str, str, str | None]]] = {
    "kohya": (_STOCK, _kohya, KOHYA),
    "BFL, ComfyUI (diffusion_model.)": (_STOCK, lambda name: f"diffusion_model.{name}", KOHYA),
    "ComfyUI with PEFT suffixes": (_STOCK, lambda name: f"diffusion_model.{name}", PEFT),
    "diffusers PEFT, ai-toolkit (transformer.)": (_DIFFUSERS, lambda name: f"transformer.{name}", PEFT),
    "PEFT with an adapter's name (lora_A.default)": (
        _DIFFUSERS, lambda name: f"transformer.{name}", ("lora_A.default.weight", "lora_B.default.weight", None),
    ),
    "old diffusers (lora.down)": (
        _DIFFUSERS, lambda name: f"transformer.{name}", ("lora.down.weight", "lora.up.weight", None),
    ),
    "OneTrainer (lora_transformer_)": (
        _DIFFUSERS, lambda name: "lora_transformer_" + name.replace(".", "_"), KOHYA,
    ),
    "SimpleTuner (lycoris_)": (_DIFFUSERS, lambda name: "lycoris_" + name.replace(".", "_"), KOHYA),
    "DiffSynth (no prefix)": (_DIFFUSERS, lambda name: name, PEFT),
    "XLabs, USO (processor)": (_XLABS, lambda name: name, ("down.weight", "up.weight", None)),
}  # fmt: skip


def named_lora(naming: str, seed: int = 19) -> dict[str, Tensor]:
    """A LoRA file for the tiny models under one naming."""
    layers, rename, (down, up, alpha) = NAMINGS[naming]
    draw, tensors = drawer(seed), {}
    for rank, (name, (n, k)) in enumerate(layers.items(), start=3):
        tensors[f"{rename(name)}.{down}"] = draw(rank, k, scale=k**-0.5)
        tensors[f"{rename(name)}.{up}"] = draw(n, rank, scale=0.2)
        if alpha is not None:
            tensors[f"{rename(name)}.{alpha}"] = torch.tensor(rank / 2)
    if "XLabs" in naming:  # by these keys ComfyUI knows the form; a tiny model has no such blocks
        for key in ("single_blocks.37.processor.qkv_lora", "double_blocks.18.processor.qkv_lora2"):
            tensors |= {f"{key}.up.weight": torch.zeros(768, 1), f"{key}.down.weight": torch.zeros(1, 256)}
    return tensors


def bfl_control_lora(widened: int = 128) -> dict[str, Tensor]:
    """A Canny or Depth LoRA as Black Forest Labs publish them: biases, norms, and an img_in with ``widened`` inputs."""
    draw, tensors = drawer(23), {}
    for name, (n, k) in (_STOCK | {"img_in": (256, widened), "final_layer.linear": (64, 256)}).items():
        tensors[f"{name}.lora_A.weight"] = draw(4, k, scale=k**-0.5)
        tensors[f"{name}.lora_B.weight"] = draw(n, 4, scale=0.1)
        tensors[f"{name}.lora_B.bias"] = draw(n, scale=0.1)
    for name in ("single_blocks.0.norm.key_norm", "double_blocks.1.img_attn.norm.query_norm"):
        tensors[f"{name}.scale"] = 1 + draw(128, scale=0.2)
    return tensors


# ---- the log


@contextmanager
def logged(level: int = logging.WARNING) -> Iterator[list[str]]:
    """What is logged at ``level`` or above, by everybody."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collect(level)
    logging.getLogger().addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger().removeHandler(handler)
