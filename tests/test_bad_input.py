"""Files that cannot be used: one line that names file, key, found, expected and what to do, and nothing else."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from files import Metadata, Tensors, changed, read_header, save_as_comfyui, tiny, write_raw
from safetensors.torch import save_file

from svdq import cli
from svdq.cli.synth import synth
from svdq.loaders import CheckpointError, open_checkpoint

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def saved(dev: Path) -> Path:
    return save_as_comfyui(dev, dev.with_name("saved.safetensors"))


def refusal(path: Path, *fragments: str) -> str:
    """The message with which ``path`` is refused, after checking its form and that it contains ``fragments``."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000, message
    assert message.startswith(str(path)), message
    assert ": found " in message and ", expected " in message and ". " in message and message.endswith("."), message
    for fragment in fragments:
        assert fragment in message, f"{fragment!r} is not in: {message}"
    return message


def fake(path: Path, *names: str, shape: tuple[int, ...] = (8, 8), dtype: torch.dtype = torch.bfloat16) -> Path:
    """A file with small tensors of these names."""
    save_file({name: torch.zeros(shape, dtype=dtype) for name in names}, path)
    return path


# ---- not a safetensors file, or a damaged one


@pytest.mark.parametrize("size", [0, 1, 7])
def test_files_of_a_few_bytes(size: int, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0"[:size])
    refusal(path, f"{size} bytes", "Download the file again")


@pytest.mark.parametrize("kind", ["dev", "saved"])
@pytest.mark.parametrize("share", [0.0001, 0.5, 0.999])
def test_truncated_files(share: float, kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    whole = request.getfixturevalue(kind).read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[: int(len(whole) * share)])
    refusal(path, "Download the file again and compare its size")


def test_bytes_after_the_end(dev: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(dev.read_bytes() + b"12345678")
    refusal(path, "data", "Download the file again")


@pytest.mark.parametrize(
    "content, what",
    [
        (b"hello, this is a text file and no model", "not a safetensors file"),
        (b"GGUF\x03\0\0\0" + bytes(100), "GGUF"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "Git LFS pointer"),
        (b"\xff" * 64, "not a safetensors file"),
        (bytes(64), "not a safetensors file"),
    ],
)
def test_other_formats(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refusal(path, what, "safetensors")


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return open, (self.marker, "w")


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.pt"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5, "zip", "torch"])
def test_pickles_are_never_run(name: str, protocol: int | str, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / name
    bomb = _Bomb(str(marker))
    if protocol == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(bomb))
    elif protocol == "torch":
        torch.save(bomb, path)
    else:
        path.write_bytes(pickle.dumps(bomb, protocol=protocol))
    refusal(path, "safetensors file")
    assert not marker.exists()
    open(*bomb.__reduce__()[1]).close()
    assert marker.exists(), "the bomb works"


KEY = f"{DOUBLE}.0.norm_q.weight"


@pytest.mark.parametrize(
    "change, fragment",
    [
        (lambda h: h[KEY].pop("dtype"), KEY),
        (lambda h: h.update({KEY: None}), KEY),
        (lambda h: h.update({KEY: [1, 2]}), KEY),
        (lambda h: h[KEY].update(dtype="BF17"), "BF17"),
        (lambda h: h[KEY].update(dtype="\n" * 10_000), r"dtype \n\n"),
        (lambda h: h.update({"a\n\x1b[2J" + "b" * 10_000: {}}), r"a\n\x1b[2Jbbbb"),
        (lambda h: h[KEY].update(dtype=["BF16"]), KEY),
        (lambda h: h[KEY].update(shape=128), KEY),
        (lambda h: h[KEY].update(shape=[-128]), KEY),
        (lambda h: h[KEY].update(shape=[128.0]), KEY),
        (lambda h: h[KEY].update(shape=[2**40, 2**40]), KEY),
        (lambda h: h[KEY].update(shape=[64]), "256 bytes"),
        (lambda h: h[KEY].update(data_offsets=[0]), KEY),
        (lambda h: h[KEY].update(data_offsets=[0, 256]), "data at byte"),
        (lambda h: h[KEY].update(data_offsets=[10**12, 10**12 + 256]), "data at byte"),
        (lambda h: h[KEY].update(data_offsets=[-256, 0]), KEY),
        (lambda h: h[KEY].update(data_offsets=[True, 256]), KEY),
        (lambda h: h.update(__metadata__={"config": {}}), "__metadata__"),
        (lambda h: h.update(__metadata__=["config"]), "__metadata__"),
        (lambda h: h.update(__metadata__="config"), "__metadata__"),
        (lambda h: h.pop(KEY), "data at byte"),
    ],
)
def test_headers_that_lie(change: Callable, fragment: str, dev: Path, tmp_path: Path) -> None:
    header, data = read_header(dev)
    change(header)
    refusal(write_raw(tmp_path / "lie.safetensors", header, data), fragment)


@pytest.mark.parametrize(
    "text",
    [
        b"[]", b"1", b"{", b'{"a":', b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 50_000, b"NaN", b'{"a": {"dtype": NaN}}',
        b'{"a": {"dtype":"BF16","shape":[1e400],"data_offsets":[0,2]}}', b"1" * 5000, b'"' + b"a" * 50,
    ],
)  # fmt: skip
def test_headers_that_are_no_json_object(text: bytes, tmp_path: Path) -> None:
    refusal(write_raw(tmp_path / "json.safetensors", text))


def test_a_key_twice_in_the_header(dev: Path, tmp_path: Path) -> None:
    header, data = read_header(dev)
    text = json.dumps(header)[:-1] + f', "{KEY}": {json.dumps(header[KEY])}' + "}"
    refusal(write_raw(tmp_path / "twice.safetensors", text.encode(), data), KEY, "twice")


def test_header_size_beyond_reason(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes(b"\xff\xff\xff\xff\xff\xff\xff\x7f{}")
    refusal(path, "header size")


# ---- other models


@pytest.mark.parametrize(
    "names, what, remedy",
    [
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "a LoRA", "LoraLoader"),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA", "LoraLoader"),
        (["diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"], "a LoRA", "LoraLoader"),
        (["lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight"], "a LoRA", "LoraLoader"),
        (["double_blocks.0.processor.qkv_lora1.down.weight"], "a LoRA", "LoraLoader"),
        (["transformer_blocks.0.mlp_fc1.lora_down", "transformer_blocks.0.mlp_fc1.lora_up"], "a LoRA", "LoraLoader"),
        (["double_blocks.0.img_attn.qkv.weight", "img_in.weight"], "FLUX model that is not SVDQuant", "Load Diffusion"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "FLUX model that is not", "Load Diffusion"),
        (["transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"], "FLUX model that is not", "Load Diffusion"),
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], "a VAE", "Load VAE"),
        (["first_stage_model.decoder.conv_in.weight"], "a VAE", "Load VAE"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "a text encoder", "DualCLIPLoader"),
        (["text_model.encoder.layers.0.self_attn.q_proj.weight"], "a text encoder", "DualCLIPLoader"),
        (["encoder.block.0.layer.0.SelfAttention.q.qweight", "shared.weight"], "a 4-bit text encoder", "t5xxl_fp8"),
        (["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"], "a ControlNet", "Load ControlNet"),
        (["controlnet_blocks.0.weight", "double_blocks.0.img_attn.qkv.weight"], "a ControlNet", "Load ControlNet"),
        (["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"], "an IP-Adapter", "custom nodes"),
        ([f"{DOUBLE}.0.attn.to_qkv.qweight", "img_in.weight"], "Qwen-Image", "a node for that model"),
        (["layers.0.attention.to_qkv.qweight"], "not FLUX.1", "a node for that model"),
        (["x_embedder.weight", "proj_out.weight"], "half of a legacy folder", "folder"),
        (["something.weight"], "no tensor of a FLUX model", "svdq-int4"),
    ],
)
def test_other_models(names: list[str], what: str, remedy: str, tmp_path: Path) -> None:
    message = refusal(fake(tmp_path / "other.safetensors", *names), what, remedy)
    assert any(name in message for name in names), "names a key that shows it"


@pytest.mark.parametrize(
    "model, other",
    [
        ("input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"),  # Stable Diffusion
        ("input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"),
        ("input_blocks.0.0.weight", "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "text_encoders.t5xxl.transformer.shared.weight"),
        ("double_blocks.0.img_attn.qkv.weight", "vae.decoder.conv_in.weight"),  # FLUX, from Comfy-Org
    ],
)
def test_all_in_one_checkpoints(model: str, other: str, tmp_path: Path) -> None:
    path = fake(tmp_path / "all.safetensors", other, f"model.diffusion_model.{model}")
    refusal(path, f"model.diffusion_model.{model}", "an all-in-one checkpoint", "Load Checkpoint")


def test_no_tensors_at_all(tmp_path: Path) -> None:
    refusal(write_raw(tmp_path / "none.safetensors", {}), "none at all")


@pytest.mark.parametrize("leaf", ["wscales", "wtscale", "wcscales"])
def test_nvfp4(leaf: str, dev: Path) -> None:
    def to_fp4(tensors: Tensors, _: Metadata) -> None:
        dtype = torch.float8_e4m3fn if leaf == "wscales" else torch.bfloat16
        tensors[f"{DOUBLE}.0.qkv_proj.{leaf}"] = torch.zeros(16, 768).to(dtype)

    refusal(changed(dev, to_fp4, f"fp4-{leaf}.safetensors"), "NVFP4", "INT4", f"qkv_proj.{leaf}", "svdq-int4 file")


def test_the_blocks_of_a_legacy_folder_alone(tmp_path: Path) -> None:
    synth(tmp_path / "folder", container="folder")
    refusal(tmp_path / "folder" / "transformer_blocks.safetensors", "x_embedder")


# ---- FLUX INT4, but not quite


def _drop(*keys: str) -> Callable[[Tensors, Metadata], None]:
    return lambda tensors, _: [tensors.pop(key) for key in keys]


def _put(key: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[Tensors, Metadata], None]:
    return lambda tensors, _: tensors.update({key: torch.zeros(shape, dtype=dtype)})


def _drop_block(prefix: str) -> Callable[[Tensors, Metadata], None]:
    return lambda tensors, _: [tensors.pop(key) for key in list(tensors) if key.startswith(prefix)]


def _config(**entries: object) -> Callable[[Tensors, Metadata], None]:
    return lambda _, metadata: metadata.update(config=json.dumps(json.loads(metadata["config"]) | entries))


@pytest.mark.parametrize(
    "change, fragments",
    [
        (_drop(f"{DOUBLE}.1.mlp_fc1.qweight"), [f"{DOUBLE}.1.mlp_fc1.qweight", "1 of", "missing"]),
        (_drop(f"{SINGLE}.0.norm_k.weight", f"{SINGLE}.0.norm_q.weight"), [f"{SINGLE}.0.norm_q.weight", "2 of"]),
        (_drop("proj_out.weight"), ["proj_out.weight", "no such key"]),
        (_drop("proj_out.bias"), ["proj_out.bias", "missing"]),
        (_drop("time_text_embed.guidance_embedder.linear_2.bias"), ["guidance_embedder.linear_2.bias"]),
        (_put("surprise.weight", 4), ["surprise.weight", "1 keys that no SVDQuant"]),
        (_put("../../../etc/passwd", 4), ["../../../etc/passwd"]),
        (_put(f"{DOUBLE}.0/../../../x.qweight", 4), [f"{DOUBLE}.0/../../../x.qweight"]),
        (_put("C:\\Windows\n\x1b[31m", 4), [r"C:\Windows\n\x1b[31m"]),
        (_put("x" * 100_000, 4), ["x" * 300 + "x", "..."]),
        (_put(f"{DOUBLE}.0.qkv_proj.lora.weight", 4), ["lora.weight"]),
        (_put(f"{DOUBLE}.0.qkv_proj.qweight", 768, 127, dtype=torch.int8), ["qweight", "[768, 127]", "[768, 128]"]),
        (_put(f"{DOUBLE}.0.qkv_proj.wscales", 768, 4), ["qkv_proj.wscales", "[768, 4]", "[4, 768]"]),
        (_put(f"{DOUBLE}.0.out_proj.smooth", 1, 256), ["out_proj.smooth", "[1, 256]"]),
        (_put(f"{SINGLE}.1.norm.linear.wscales", 5, 768), ["norm.linear.wscales", "5 rows", "4"]),
        (_put(f"{SINGLE}.1.norm_q.weight", 64), ["norm_q.weight", "[64]", "[128]"]),
        (_put(f"{DOUBLE}.0.qkv_proj.qweight", 768, 128, dtype=torch.uint8), ["qkv_proj.qweight", "U8", "I8"]),
        (_put(f"{DOUBLE}.0.qkv_proj.wscales", 4, 768, dtype=torch.float32), ["wscales", "F32", "BF16 or F16"]),
        (_put(f"{DOUBLE}.0.norm1.linear.qweight", 384, 128, dtype=torch.int8), ["norm1.linear.qweight", "I8", "I32"]),
        (_put("proj_out.weight", 64, 256, dtype=torch.int32), ["proj_out.weight", "I32"]),
        (_put("x_embedder.weight", 256), ["x_embedder.weight", "[256]", "matrix"]),
        (_put("x_embedder.weight", 192, 64), ["x_embedder.weight", "hidden size 192", "a multiple of 128"]),
        (_put("x_embedder.weight", 0, 64), ["x_embedder.weight", "hidden size 0"]),
        (_put("x_embedder.weight", 256, 0), ["x_embedder.weight", "0 input channels"]),
        (_put("context_embedder.weight", 256, 0), ["context_embedder.weight", "no inputs"]),
        (_put("x_embedder.weight", 256, 66), ["x_embedder.weight", "66 input channels", "multiple of 4"]),
        (_put("x_embedder.weight", 384, 64), ["hidden size 384"]),
        (_put(f"{DOUBLE}.0.qkv_proj.lora_down", 256, 24), ["qkv_proj.lora_", "rank"]),
        (_drop(f"{DOUBLE}.0.qkv_proj.lora_up"), ["qkv_proj.lora_down", "only one"]),
        (_drop_block(f"{DOUBLE}.0."), [f"{DOUBLE}.0", "gap"]),
        (_drop_block(f"{SINGLE}.0."), [f"{SINGLE}.0", "gap"]),
        (_drop_block(f"{SINGLE}.1."), ["num_single_layers", "found 1", "expected 2"]),
        (_drop_block(f"{DOUBLE}."), ["transformer_blocks"]),
        (_config(num_layers=19), ["num_layers", "found 2", "expected 19"]),
        (_config(num_layers="two"), ["num_layers"]),
    ],
)
def test_tensor_sets_that_do_not_fit(change: Callable, fragments: list[str], dev: Path) -> None:
    refusal(changed(dev, change), *fragments)


def test_a_rank_that_is_no_multiple_of_16(dev: Path) -> None:
    def change(tensors: Tensors, _: Metadata) -> None:
        for leaf, size in (("lora_down", 256), ("lora_up", 768)):
            tensors[f"{DOUBLE}.0.qkv_proj.{leaf}"] = torch.zeros(size, 24, dtype=torch.bfloat16)

    refusal(changed(dev, change), "qkv_proj.lora_down", "rank 24", "a multiple of 16")


def test_a_layer_in_both_namings(dev: Path) -> None:
    def change(tensors: Tensors, _: Metadata) -> None:
        tensors[f"{DOUBLE}.0.attn.to_qkv.qweight"] = tensors[f"{DOUBLE}.0.qkv_proj.qweight"].clone()

    refusal(changed(dev, change), f"{DOUBLE}.0.attn.to_qkv.qweight", f"{DOUBLE}.0.qkv_proj.qweight")


def test_messages_use_the_names_of_the_file(dev: Path) -> None:
    def change(tensors: Tensors, _: Metadata) -> None:
        tensors.pop(f"{DOUBLE}.0.qkv_proj.lora_up")
        tensors[f"{DOUBLE}.0.attn.to_qkv.proj_up"] = torch.zeros(768, 16, dtype=torch.bfloat16)

    refusal(changed(dev, change), f"{DOUBLE}.0.attn.to_qkv.proj_up")


@pytest.mark.parametrize("key", ["config", "comfy_config", "quantization_config"])
@pytest.mark.parametrize("text", ["{", "", "[]", "1", '{"a": 1,}', "[" * 100_000, "\0"])
def test_metadata_that_is_no_json_object(key: str, text: str, dev: Path) -> None:
    bad = changed(dev, lambda _, metadata: metadata.update({key: text}))
    refusal(bad, f"metadata {key}", "JSON", "remove that metadata entry")


# ---- saved by ComfyUI

QKV, MOD = "model.diffusion_model.double_blocks.0.img_attn.qkv", "model.diffusion_model.double_blocks.0.img_mod.lin"


def _describe(layer: str, **entries: object) -> Callable[[Tensors, Metadata], None]:
    def change(tensors: Tensors, _: Metadata) -> None:
        described = json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist())) | entries
        text = json.dumps({entry: value for entry, value in described.items() if value is not None})
        _text(layer, text.encode())(tensors, _)

    return change


def _text(layer: str, text: bytes) -> Callable[[Tensors, Metadata], None]:
    content = torch.tensor(list(text), dtype=torch.uint8)
    return lambda tensors, _: tensors.update({f"{layer}.comfy_quant": content})


def _both(*changes: Callable[[Tensors, Metadata], None]) -> Callable[[Tensors, Metadata], None]:
    return lambda tensors, metadata: [change(tensors, metadata) for change in changes]


@pytest.mark.parametrize(
    "change, fragments",
    [
        (_drop(f"{QKV}.weight_smooth"), [f"{QKV}.weight_smooth", "1 of", "missing", "save it again"]),
        (_drop(f"{QKV}.comfy_quant"), [f"{QKV}.comfy_quant", "missing"]),
        (_drop(f"{QKV}.weight_down"), [f"{QKV}.weight_down", "missing"]),
        (_drop("model.diffusion_model.img_in.weight"), ["model.diffusion_model.img_in.weight", "no such key"]),
        (_drop_block("model.diffusion_model.single_blocks.0."), ["model.diffusion_model.single_blocks.0", "gap"]),
        (_put(f"{QKV}.weight_other", 4), [f"{QKV}.weight_other", "1 keys that no SVDQuant", "Save the model again"]),
        (_put("model.diffusion_model.surprise", 4), ["surprise"]),
        (_put(f"{QKV}.weight", 768, 256), [f"{QKV}.weight", "BF16", "I8"]),
        (_put(f"{QKV}.weight", 768, 256, dtype=torch.int8), [f"{QKV}.weight", "[768, 256]", "[768, 128]"]),
        (_put(f"{QKV}.weight_scale", 768, 4), [f"{QKV}.weight_scale", "[4, 768]"]),
        (_put(f"{QKV}.bias", 769), [f"{QKV}.bias", "[768]"]),
        (_put(f"{QKV}.weight_up", 768, 16), [f"{QKV}.weight_up", "rank 16", "rank 32, as weight_down"]),
        (_put(f"{MOD}.weight_zeros", 5, 1536), [f"{MOD}.weight_zeros", "5 rows", "4"]),
        (_put(f"{MOD}.lora_down", 3, 256), [f"{MOD}.lora_down", "only one"]),
        (_both(_put(f"{MOD}.lora_down", 3, 256), _put(f"{MOD}.lora_up", 1536, 4)), [f"{MOD}.lora_up", "rank 3"]),
        (_both(_put(f"{MOD}.lora_down", 0, 256), _put(f"{MOD}.lora_up", 1536, 0)), [f"{MOD}.lora_up", "rank 0"]),
        (_put(f"{MOD}.lora_down", 3, 255), [f"{MOD}.lora_down", "[3, 255]"]),
        (_put("model.diffusion_model.img_in.weight", 256, 66), ["img_in.weight", "66 input channels"]),
        (_put("model.diffusion_model.img_in.weight", 192, 64), ["img_in.weight", "hidden size 192"]),
        (_describe(QKV, format="float8_e4m3fn"), [f"{QKV}.comfy_quant", "float8_e4m3fn", "svdq_int4"]),
        (_describe(QKV, format="svdq_awq"), [f"{QKV}.comfy_quant", "svdq_int4"]),
        (_describe(QKV, axis=1), [f"{QKV}.comfy_quant"]),
        (_describe(QKV, unsigned=True), [f"{QKV}.comfy_quant"]),
        (_describe(QKV, shape=[256, 768]), [f"{QKV}.comfy_quant", "[768, 256]"]),
        (_describe(QKV, shape=None), [f"{QKV}.comfy_quant"]),
        (_describe(MOD, splits=3), [f"{MOD}.comfy_quant", "svdq_awq"]),
        *[
            (_text(QKV, text), [f"{QKV}.comfy_quant"])
            for text in (b"", b"{", b"[]", b"1", b"null", b"\xff\xfe", b"[" * 900, b"\n{}\n", b" " * 2000)
        ],
    ],
)
def test_saved_models_that_do_not_fit(change: Callable, fragments: list[str], saved: Path) -> None:
    refusal(changed(saved, change), *fragments)


def test_a_quantized_model_of_another_kind(tmp_path: Path) -> None:
    names = ["model.diffusion_model.double_blocks.0.img_attn.qkv" + leaf for leaf in (".weight", ".comfy_quant")]
    refusal(fake(tmp_path / "fp8.safetensors", *names), "FLUX model that is not SVDQuant", "Load Diffusion")


# ---- folders


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    refusal(tmp_path / "nothing.safetensors", "nothing there", "Check the path")


@pytest.mark.parametrize("files", [[], ["README.md"], ["flux1-dev.safetensors"]])
def test_folders_that_are_no_legacy_folder(files: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(b"")
    refusal(folder, "transformer_blocks.safetensors", "unquantized_layers.safetensors")


@pytest.mark.parametrize("missing", ["transformer_blocks.safetensors", "unquantized_layers.safetensors"])
def test_legacy_folder_with_a_file_missing(missing: str, tmp_path: Path) -> None:
    folder = tmp_path / "svdq-int4-flux.1-dev"
    synth(folder, container="folder")
    (folder / missing).unlink()
    refusal(folder, missing, f"Download {missing} into the folder")


def test_legacy_folder_with_bad_parts(tmp_path: Path) -> None:
    folder = tmp_path / "svdq-int4-flux.1-dev"
    synth(folder, container="folder")
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xff\xfe")
    refusal(folder, "config.json")
    (folder / "config.json").write_bytes(b"{")
    refusal(folder, "config", "JSON")
    (folder / "config.json").write_bytes(config)
    outer = folder / "unquantized_layers.safetensors"
    outer.write_bytes(outer.read_bytes()[:-1])
    refusal(folder, "unquantized_layers.safetensors", "Download the file again")


def test_a_path_that_is_neither_file_nor_folder(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes on this system")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refusal(tmp_path / "pipe.safetensors", "neither file nor folder")


def test_a_file_that_may_not_be_read(dev: Path) -> None:
    path = changed(dev, lambda *_: None, "private.safetensors")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    refusal(path, "Permission denied", "permissions")


# ---- everything at random


@pytest.mark.parametrize("kind", ["dev", "saved"])
def test_fuzzed_headers(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Whatever happens to a header: a checkpoint that reads, or a CheckpointError of one line."""
    whole = request.getfixturevalue(kind).read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(whole)
    generator = random.Random(20250101)
    outcomes = {"opened": 0, "refused": 0}
    for _ in range(150):
        header = bytearray(whole[:size])
        for _ in range(generator.choice([1, 1, 1, 2, 5, 20])):
            kind, at = generator.randrange(4), generator.randrange(len(header))
            if kind == 0:
                header[at] ^= 1 << generator.randrange(8)
            elif kind == 1:
                header[at] = generator.randrange(256)
            elif kind == 2:
                header[at : at + generator.randrange(1, 40)] = b" "
            else:
                header[at:at] = generator.choice([b'"', b"{", b"}", b"]", b"0", b"-", b",", b"\\u0000", b"\xf0"])
        with path.open("r+b") as file:
            file.write(header[:size].ljust(size))
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            for name in checkpoint.layer_names[:12]:
                checkpoint.layer(name)
            outcomes["opened"] += 1
    assert outcomes["refused"] > 50


# ---- the same in the command line


@pytest.mark.parametrize("command", ["inspect", "dequantize"])
def test_commands_say_it_in_one_line(
    command: str, dev: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "RESTARTED", "PATH_OF_NO_CONSEQUENCE")
    bad = changed(dev, _drop("proj_out.bias"))
    out = tmp_path / "out.safetensors"
    for path in (bad, tmp_path / "missing.safetensors", fake(tmp_path / "vae.safetensors", "decoder.conv_in.weight")):
        monkeypatch.setenv("PATH_OF_NO_CONSEQUENCE", "1")
        code = cli.main([command, str(path)] + ([str(out)] if command == "dequantize" else []))
        captured = capsys.readouterr()
        assert code == 2
        assert captured.err.startswith(f"error: {path}: ") and captured.err.count("\n") == 1
        assert "Traceback" not in captured.out + captured.err
    assert not out.exists() and not list(tmp_path.glob(".*"))
