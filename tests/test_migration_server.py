"""Prompts made for ComfyUI-nunchaku, posted to ComfyUI's server."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from server_fixture import DEMO_MODEL, EXTRA_MODEL, LEGACY_MODEL, LORA, RunningServer, demo_prompt
from test_migration import FLUX, FOUR_BIT_T5, LEFT_OUT, NEW_STACK, RELEASES, WITHOUT_EQUIVALENT

from svdq.cli.comfy_client import ExecutionFailed, PromptRejected, images_of
from svdq.cli.comfy_server import ComfyServer

EXPORTED = {"_meta": {"title": "as the editor exports it"}}
EXPORTED_LOADER = {
    "class_type": "NunchakuFluxDiTLoader",
    "inputs": {
        "model_path": DEMO_MODEL,
        "cache_threshold": 0,
        "attention": "nunchaku-fp16",
        "cpu_offload": "auto",
        "device_id": 0,
        "data_type": "bfloat16",
        "i2f_mode": "enabled",
    },
    **EXPORTED,
}


def old_loader(**inputs: Any) -> dict[str, Any]:
    return EXPORTED_LOADER | {"inputs": EXPORTED_LOADER["inputs"] | inputs}


def picture(server: RunningServer, prompt: dict[str, Any]) -> np.ndarray:
    """Run the prompt; the one image that it saved, uint8 [height, width, 3]."""
    (image,) = images_of(server.client.run(prompt, timeout=120))
    return np.asarray(Image.open(io.BytesIO(server.client.image(**image))).convert("RGB"))


def behind_the_loader(**nodes: dict[str, Any]) -> dict[str, Any]:
    """The demo prompt with nodes between loader and sampler; the last one feeds the sampler."""
    return demo_prompt(sampler={"model": [list(nodes)[-1], 0]}) | nodes


def lora(model: str, strength: float) -> dict[str, Any]:
    inputs = {"model": [model, 0], "lora_name": LORA, "strength_model": strength}
    return {"class_type": "LoraLoaderModelOnly", "inputs": inputs}


@pytest.mark.server
def test_editor_is_told_all_replacements(comfy_server: RunningServer) -> None:
    told = comfy_server.client.get_json("/node_replacements")
    assert {old for old, *_ in RELEASES.values()} | set(WITHOUT_EQUIVALENT) <= set(told)
    assert told["NunchakuFluxDiTLoader"][0]["old_widget_ids"][:2] == ["model_path", "cache_threshold"]


@pytest.mark.server
@pytest.mark.parametrize(
    "loader",
    [
        EXPORTED_LOADER,
        {key: value for key, value in EXPORTED_LOADER.items() if key != "_meta"},
        {"class_type": "NunchakuFluxDiTLoader", "inputs": {"model_path": DEMO_MODEL, "cpu_offload": "auto"}},
        {"class_type": "SVDQuantFluxDiTLoader", "inputs": {"model_path": DEMO_MODEL, "device_id": 0}, **EXPORTED},
        old_loader(model_path=LEGACY_MODEL),
        old_loader(model_path=EXTRA_MODEL),
        old_loader(device_id=7),
    ],
    ids=["exported", "by a program", "early", "first", "legacy folder", "extra_model_paths", "no such GPU"],
)
def test_old_loader_makes_the_same_picture(comfy_server: RunningServer, loader: dict[str, Any]) -> None:
    ours = picture(comfy_server, demo_prompt(sampler={"seed": 71}))
    assert np.array_equal(picture(comfy_server, demo_prompt(sampler={"seed": 71}) | {"loader": loader}), ours)


@pytest.mark.server
def test_log_names_what_was_left_out(comfy_server: RunningServer) -> None:
    comfy_server.client.free()
    picture(comfy_server, demo_prompt(sampler={"seed": 72}) | {"loader": EXPORTED_LOADER})
    assert f"Nunchaku workflow: left out {LEFT_OUT}\n" in comfy_server.server.log_text()


@pytest.mark.server
def test_cache_threshold_turns_easy_cache_on(comfy_server: RunningServer) -> None:
    cache = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    easy = {"class_type": "EasyCache", "inputs": {"model": ["loader", 0], **cache}}
    stock = picture(comfy_server, behind_the_loader(cache=easy))
    log = len(comfy_server.server.log_text())
    old = picture(comfy_server, demo_prompt() | {"loader": old_loader(cache_threshold=0.12)})
    assert np.array_equal(old, stock)
    assert "EasyCache enabled - threshold: 0.2" in comfy_server.server.log_text()[log:]


@pytest.mark.server
def test_float16_computes_in_float16(comfy_server: RunningServer) -> None:
    half = {"class_type": "ModelComputeDtype", "inputs": {"model": ["loader", 0], "dtype": "fp16"}}
    stock = picture(comfy_server, behind_the_loader(half=half))
    old = picture(comfy_server, demo_prompt() | {"loader": old_loader(data_type="float16")})
    assert np.array_equal(old, stock)
    full = picture(comfy_server, demo_prompt())
    # Another number format, the same picture.
    assert not np.array_equal(old, full) and np.abs(old.astype(int) - full.astype(int)).mean() < 1


@pytest.mark.server
@pytest.mark.parametrize("node", ["NunchakuFluxLoraLoader", "SVDQuantFluxLoraLoader", "NunchakuFluxLoraStack"])
def test_old_lora_nodes_do_what_the_stock_node_does(comfy_server: RunningServer, node: str) -> None:
    single = {"model": ["loader", 0], "lora_name": LORA, "lora_strength": 0.8}
    first = {"lora_format": "auto", "base_model_name": "svdq-int4-flux.1-dev", "save_converted_lora": "disable"}
    slots = {"lora_name_1": LORA, "lora_strength_1": 0.8, "lora_name_4": LORA, "lora_strength_4": -0.3}
    inputs = {
        "NunchakuFluxLoraLoader": single,
        "SVDQuantFluxLoraLoader": single | first,
        "NunchakuFluxLoraStack": {"model": ["loader", 0]} | NEW_STACK | slots,
    }[node]
    chain = {"a": lora("loader", 0.8)} | ({"b": lora("a", -0.3)} if node.endswith("Stack") else {})
    stock = picture(comfy_server, behind_the_loader(**chain))
    prompt = behind_the_loader(old={"class_type": node, "inputs": inputs, **EXPORTED}) | {"loader": EXPORTED_LOADER}
    assert np.array_equal(picture(comfy_server, prompt), stock)
    assert not np.array_equal(stock, picture(comfy_server, demo_prompt()))


@pytest.mark.server
@pytest.mark.parametrize("node", ["NunchakuFluxPuLIDApplyV2", "NunchakuFluxIPAdapterApply", "NunchakuPulidApply"])
def test_node_without_equivalent_is_refused_by_name(comfy_server: RunningServer, node: str) -> None:
    links, widgets = WITHOUT_EQUIVALENT[node]
    origin = {"model": ["loader", 0], "image": ["picture", 0]}
    inputs = {name: origin.get(name, ["other", 1]) for name in links} | widgets
    prompt = behind_the_loader(
        picture={"class_type": "LoadImage", "inputs": {"image": "example.png"}, **EXPORTED},
        other={"class_type": "NunchakuPuLIDLoaderV2", "inputs": {"model": ["loader", 0]}, **EXPORTED},
        apply={"class_type": node, "inputs": inputs, **EXPORTED},
    )
    with pytest.raises(PromptRejected, match=f"{node} has no equivalent: use .* bypass this node"):
        comfy_server.client.queue(prompt | {"loader": EXPORTED_LOADER})


@pytest.mark.server
def test_depth_preprocessor_is_refused_by_name(comfy_server: RunningServer) -> None:
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "2": {"class_type": "NunchakuDepthPreprocessor", "inputs": {"image": ["1", 0], "model_path": "depth"}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    with pytest.raises(PromptRejected, match=r"NunchakuDepthPreprocessor has no equivalent: use .*Depth Anything 3"):
        comfy_server.client.queue(prompt)


@pytest.mark.server
def test_what_is_missing_is_named(comfy_server: RunningServer) -> None:
    with pytest.raises(PromptRejected, match=r"Value not in list: model_name: 'svdq-fp4_r32-flux.1-dev.safetensors'"):
        comfy_server.client.queue(demo_prompt() | {"loader": old_loader(model_path=FLUX.replace("int4", "fp4"))})
    with pytest.raises(PromptRejected, match="model_name"):
        comfy_server.client.queue(demo_prompt() | {"loader": {"class_type": "NunchakuFluxDiTLoader", "inputs": {}}})


@pytest.mark.server
def test_4bit_t5_is_explained_in_one_line(comfy_server: RunningServer) -> None:
    save_file(
        {"encoder.block.0.layer.0.SelfAttention.q.qweight": torch.zeros(1)},
        comfy_server.models / "text_encoders" / FOUR_BIT_T5,
    )
    encoders = {"model_type": "flux.1", "text_encoder1": FOUR_BIT_T5, "text_encoder2": "clip_l.safetensors"}
    prompt = demo_prompt() | {
        "clip": {"class_type": "NunchakuTextEncoderLoaderV2", "inputs": encoders | {"t5_min_length": 512}, **EXPORTED},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": "a fox"}},
    }
    with pytest.raises(ExecutionFailed) as failure:
        comfy_server.client.run(prompt, timeout=60)
    message = failure.value.details["exception_message"].strip()
    assert FOUR_BIT_T5 in message and "t5xxl_fp16.safetensors" in message and "\n" not in message


NUNCHAKU_STUB = """
class NunchakuFluxDiTLoader:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model_path": ("STRING",)}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = ("STRING",), "load", "Nunchaku", True

    def load(self, model_path):
        return {"ui": {"text": ["Nunchaku loads " + model_path]}, "result": (model_path,)}

NODE_CLASS_MAPPINGS = {"NunchakuFluxDiTLoader": NunchakuFluxDiTLoader}
"""


@pytest.mark.server
@pytest.mark.parametrize("folder", ["ComfyUI-nunchaku", "zz-nunchaku"], ids=["loaded first", "loaded last"])
def test_both_packs_side_by_side(tmp_path: Path, folder: str) -> None:
    """A pack that has Nunchaku's node id keeps it; what it lacks is still replaced."""
    pack = tmp_path / "custom_nodes" / folder
    pack.mkdir(parents=True)
    (pack / "__init__.py").write_text(NUNCHAKU_STUB, encoding="utf-8")
    with ComfyServer(tmp_path, cpu=True, pack_name="svdq-flux-under-test") as server:
        assert server.client.object_info("NunchakuFluxDiTLoader")["NunchakuFluxDiTLoader"]["category"] == "Nunchaku"
        loader = {"class_type": "NunchakuFluxDiTLoader", "inputs": {"model_path": "a.safetensors"}}
        entry = server.client.run({"1": loader}, timeout=60)
        assert entry["outputs"] == {"1": {"text": ["Nunchaku loads a.safetensors"]}}
        assert entry["prompt"][2]["1"]["class_type"] == "NunchakuFluxDiTLoader"
        merger = {"class_type": "NunchakuModelMerger", "inputs": {"model_folder": "a", "save_name": "b"}}
        preview = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
        with pytest.raises(PromptRejected, match="NunchakuModelMerger has no equivalent"):
            server.client.queue({"1": merger, "2": preview})
