"""Names of the same FLUX layer in ComfyUI's model and in SVDQuant files. Data and pure functions; no tensors.

Sources of the stored names: the original converter's output and its second naming ("V2", in-memory upstream).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class W4A4Source:
    """Stored layers that make one W4A4 linear; ``axis`` as in weights.W4A4Linear, ``unsigned`` per part."""

    parts: tuple[str, ...]
    axis: int
    unsigned: tuple[bool, ...]


@dataclass(frozen=True)
class AWQSource:
    """Stored AWQ layer of a modulation linear with ``splits`` interleaved chunks."""

    name: str
    splits: int


@dataclass(frozen=True)
class PlainSource:
    """Stored 16-bit layer. ``swap_halves``: its two halves (scale, shift) stand in the opposite order in the model.

    A linear that is quantized in other files is stored under its stock name where a file has it in 16 bits.
    """

    name: str
    has_bias: bool
    swap_halves: bool = False


@dataclass(frozen=True)
class Int8Source:
    """Stored INT8 layer, under its stock name: a linear that is in four bits in other files."""

    name: str


Source = W4A4Source | AWQSource | PlainSource | Int8Source

INT8_LEAVES = ("weight", "weight_scale", "weight_smooth", "bias")

LOW_RANK_LEAVES = ("lora_down", "lora_up")

_V2_LEAVES = {
    "proj_down": "lora_down",
    "proj_up": "lora_up",
    "smooth_factor": "smooth",
    "smooth_factor_orig": "smooth_orig",
}
_V2_DOUBLE = {
    "attn.to_qkv": "qkv_proj",
    "attn.add_qkv_proj": "qkv_proj_context",
    "attn.to_out.0": "out_proj",
    "attn.to_add_out": "out_proj_context",
    "ff.net.0.proj": "mlp_fc1",
    "ff.net.2": "mlp_fc2",
    "ff_context.net.0.proj": "mlp_context_fc1",
    "ff_context.net.2": "mlp_context_fc2",
    "attn.norm_q": "norm_q",
    "attn.norm_k": "norm_k",
    "attn.norm_added_q": "norm_added_q",
    "attn.norm_added_k": "norm_added_k",
}
_V2_SINGLE = {"attn.to_qkv": "qkv_proj", "attn.to_out": "out_proj", "attn.norm_q": "norm_q", "attn.norm_k": "norm_k"}
_BLOCKS = {"transformer_blocks": _V2_DOUBLE, "single_transformer_blocks": _V2_SINGLE}


def canonical_key(key: str) -> str:
    """A stored key in the first naming; keys of the second naming are translated, all others come back unchanged."""
    block, _, rest = key.partition(".")
    if block not in _BLOCKS:
        return key
    index, _, rest = rest.partition(".")
    layer, _, leaf = rest.rpartition(".")
    layer = _BLOCKS[block].get(layer, layer)
    return f"{block}.{index}.{layer}.{_V2_LEAVES.get(leaf, leaf)}"


def double_block(index: int) -> dict[str, Source]:
    """Stock module name -> stored layer(s), for one double block."""
    ours, theirs = f"double_blocks.{index}", f"transformer_blocks.{index}"
    sources: dict[str, Source] = {}
    for stream, suffix, added in (("img", "", ""), ("txt", "_context", "added_")):
        mlp = "mlp_context_" if suffix else "mlp_"
        sources |= {
            f"{ours}.{stream}_mod.lin": AWQSource(f"{theirs}.norm1{suffix}.linear", splits=6),
            f"{ours}.{stream}_attn.qkv": W4A4Source((f"{theirs}.qkv_proj{suffix}",), 0, (False,)),
            f"{ours}.{stream}_attn.norm.query_norm": PlainSource(f"{theirs}.norm_{added}q", has_bias=False),
            f"{ours}.{stream}_attn.norm.key_norm": PlainSource(f"{theirs}.norm_{added}k", has_bias=False),
            f"{ours}.{stream}_attn.proj": W4A4Source((f"{theirs}.out_proj{suffix}",), 0, (False,)),
            f"{ours}.{stream}_mlp.0": W4A4Source((f"{theirs}.{mlp}fc1",), 0, (False,)),
            f"{ours}.{stream}_mlp.2": W4A4Source((f"{theirs}.{mlp}fc2",), 0, (True,)),
        }
    return sources


def single_block(index: int) -> dict[str, Source]:
    """Stock module name -> stored layer(s), for one single block."""
    ours, theirs = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
    return {
        f"{ours}.modulation.lin": AWQSource(f"{theirs}.norm.linear", splits=3),
        f"{ours}.linear1": W4A4Source((f"{theirs}.qkv_proj", f"{theirs}.mlp_fc1"), 0, (False, False)),
        f"{ours}.norm.query_norm": PlainSource(f"{theirs}.norm_q", has_bias=False),
        f"{ours}.norm.key_norm": PlainSource(f"{theirs}.norm_k", has_bias=False),
        f"{ours}.linear2": W4A4Source((f"{theirs}.out_proj", f"{theirs}.mlp_fc2"), 1, (False, True)),
    }


def outer_layers(guidance: bool) -> dict[str, Source]:
    """Stock module name -> stored layer, for everything outside the blocks."""
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    if guidance:
        embedders["guidance_in"] = "guidance_embedder"
    sources: dict[str, Source] = {
        "img_in": PlainSource("x_embedder", has_bias=True),
        "txt_in": PlainSource("context_embedder", has_bias=True),
    }
    for ours, theirs in embedders.items():
        sources[f"{ours}.in_layer"] = PlainSource(f"time_text_embed.{theirs}.linear_1", has_bias=True)
        sources[f"{ours}.out_layer"] = PlainSource(f"time_text_embed.{theirs}.linear_2", has_bias=True)
    sources["final_layer.adaLN_modulation.1"] = PlainSource("norm_out.linear", has_bias=True, swap_halves=True)
    sources["final_layer.linear"] = PlainSource("proj_out", has_bias=True)
    return sources


def all_layers(
    depth: int,
    depth_single_blocks: int,
    guidance: bool,
    plain_linears: Collection[str] = (),
    int8_linears: Collection[str] = (),
) -> dict[str, Source]:
    """Stock module name -> stored layer(s), for a whole model, in model order. plain_linears, int8_linears: stock names
    of those that are in 16 bits and in INT8, of the linears in blocks."""
    sources = outer_layers(guidance)
    for index in range(depth):
        sources |= double_block(index)
    for index in range(depth_single_blocks):
        sources |= single_block(index)
    sources |= {name: PlainSource(name, has_bias=True) for name in sources if name in plain_linears}
    return sources | {name: Int8Source(name) for name in sources if name in int8_linears}
