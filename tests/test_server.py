"""The pack inside the real ComfyUI server, through its HTTP and websocket API, as the editor uses it."""

from __future__ import annotations

import io
import json
import os
import urllib.error
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from server_fixture import (
    BAD_MODELS,
    DEMO_MODEL,
    EXTRA_MODEL,
    LEGACY_MODEL,
    LORA,
    STAND_IN_MODELS,
    RunningServer,
    demo_prompt,
)

from svdq.cli.comfy_client import Event, ExecutionFailed, ExecutionInterrupted, PromptRejected, images_of
from svdq.cli.dequantize import dequantize
from svdq.cli.workflow import find_node, set_input, to_prompt

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
NODES = (
    "SVDQFluxLoader",
    "SVDQFluxSampler",
    "SVDQFluxQuantize",
    "SVDQSaveConditioning",
    "SVDQLoadConditioning",
    "SVDQDemoPrompt",
)


def api_prompt(server: RunningServer, workflow: str) -> dict[str, Any]:
    """A shipped workflow as the editor would queue it."""
    graph = json.loads((ROOT / "workflows" / f"{workflow}.json").read_text(encoding="utf-8"))
    return to_prompt(graph, server.client.object_info())


def picture(server: RunningServer, prompt: dict[str, Any], events: list[Event] | None = None) -> np.ndarray:
    """Run the prompt; the one image that it saved, uint8 [height, width, 3]."""
    entry = server.client.run(prompt, on_event=events.append if events is not None else None, timeout=120)
    assert entry["status"]["status_str"] == "success"
    (image,) = images_of(entry)
    return np.asarray(Image.open(io.BytesIO(server.client.image(**image))).convert("RGB"))


def cached_nodes(events: list[Event]) -> set[str]:
    """Ids of the nodes whose results ComfyUI reused."""
    return {node for event in events if event.type == "execution_cached" for node in event.data["nodes"]}


@pytest.mark.parametrize("node", NODES)
def test_every_node_explains_itself(comfy_server: RunningServer, node: str) -> None:
    info = comfy_server.client.object_info(node)[node]
    assert info["category"] == "SVDQ"
    assert info["description"] and info["search_aliases"]
    inputs = info["input"]["required"] | info["input"].get("optional", {})
    assert all(options.get("tooltip") for _, options in inputs.values())
    assert all(info["output_tooltips"])


def test_dropdown_lists_every_folder_and_svdq_first(comfy_server: RunningServer) -> None:
    info = comfy_server.client.object_info("SVDQFluxLoader")["SVDQFluxLoader"]
    names = info["input"]["required"]["model_name"][1]["options"]
    assert EXTRA_MODEL in names  # from extra_model_paths.yaml
    assert "bad-legacy-folder" in names and not any("transformer_blocks" in name for name in names)
    has_svdq = ["svdq" in name for name in names]
    assert has_svdq == sorted(has_svdq, reverse=True)


@pytest.mark.parametrize("workflow", [path.stem for path in WORKFLOWS])
def test_shipped_workflow_validates(comfy_server: RunningServer, workflow: str) -> None:
    prompt_id = comfy_server.client.queue(api_prompt(comfy_server, workflow))
    # It validated, or queue() would have raised. Running it is another test's business.
    comfy_server.client.post_json("/queue", {"delete": [prompt_id]})
    comfy_server.client.interrupt()
    comfy_server.wait_until_idle()


def test_demo_workflow_runs_to_a_picture(comfy_server: RunningServer) -> None:
    prompt = api_prompt(comfy_server, "SVDQ FLUX demo")
    sampler = find_node(prompt, "SVDQFluxSampler")
    steps = prompt[sampler]["inputs"]["steps"]
    comfy_server.client.free()
    events: list[Event] = []
    image = picture(comfy_server, prompt, events)
    assert image.shape == (128, 128, 3)
    assert image.std() > 5, "the picture is flat"

    progress = [event.data for event in events if event.type == "progress" and event.data["node"] == sampler]
    assert progress and progress[-1]["value"] == progress[-1]["max"] == steps
    previews = [Image.open(io.BytesIO(event.data)) for event in events if event.type == "preview"]
    assert previews and previews[-1].width == previews[-1].height
    executed = {event.data["node"] for event in events if event.type == "executing"} - {None}
    assert executed == set(prompt)


@pytest.mark.parametrize("workflow", [path.stem for path in WORKFLOWS if "demo" not in path.stem])
def test_workflow_runs_without_its_text_encoder(comfy_server: RunningServer, workflow: str) -> None:
    """The real workflows, small, with the demo prompt in place of the 5 GB encoders."""
    prompt = api_prompt(comfy_server, workflow)
    loader, text = find_node(prompt, "SVDQFluxLoader"), find_node(prompt, "CLIPTextEncode")
    del prompt[find_node(prompt, "DualCLIPLoader")]
    prompt[text] = {"class_type": "SVDQDemoPrompt", "inputs": {"model": [loader, 0], "text": "a fox"}}
    set_input(prompt, "SVDQFluxSampler", "steps", 4)
    kinds = {node["class_type"] for node in prompt.values()}
    if "ImageScaleToTotalPixels" in kinds:
        set_input(prompt, "ImageScaleToTotalPixels", "megapixels", 0.02)
    elif "FluxKontextImageScale" in kinds:  # to a megapixel
        image = prompt[find_node(prompt, "FluxKontextImageScale")]
        image["class_type"] = "ImageScale"
        image["inputs"] |= {"upscale_method": "area", "width": 128, "height": 128, "crop": "disabled"}
    else:
        for side in ("width", "height"):
            set_input(prompt, "EmptySD3LatentImage", side, 128)
    assert picture(comfy_server, prompt).std() > 5


def test_second_queue_reuses_the_loaded_model(comfy_server: RunningServer) -> None:
    picture(comfy_server, demo_prompt(sampler={"seed": 11}))
    loads = comfy_server.loads()
    events: list[Event] = []
    picture(comfy_server, demo_prompt(sampler={"seed": 12}), events)
    assert {"loader", "text", "vae"} <= cached_nodes(events)
    assert "sampler" not in cached_nodes(events)
    assert comfy_server.loads() == loads


def test_replaced_file_is_loaded_again(comfy_server: RunningServer) -> None:
    picture(comfy_server, demo_prompt(sampler={"seed": 13}))
    loads = comfy_server.loads()
    stat = comfy_server.demo_model.stat()
    os.utime(comfy_server.demo_model, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    events: list[Event] = []
    picture(comfy_server, demo_prompt(sampler={"seed": 13}), events)
    assert "loader" not in cached_nodes(events)
    assert comfy_server.loads() == loads + 1


def test_same_seed_gives_the_same_picture(comfy_server: RunningServer) -> None:
    first = picture(comfy_server, demo_prompt(sampler={"seed": 21}))
    other_seed = picture(comfy_server, demo_prompt(sampler={"seed": 22}))
    other_text = picture(comfy_server, demo_prompt(sampler={"seed": 21}, text={"text": "another test"}))
    comfy_server.client.free()
    events: list[Event] = []
    again = picture(comfy_server, demo_prompt(sampler={"seed": 21}), events)
    assert "sampler" not in cached_nodes(events), "nothing was computed again"
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other_seed)
    assert not np.array_equal(first, other_text)


@pytest.mark.parametrize(("name", "variant"), STAND_IN_MODELS.items())
def test_guidance_reaches_models_that_have_it(comfy_server: RunningServer, name: str, variant: str) -> None:
    low, high = (
        picture(comfy_server, demo_prompt(loader={"model_name": name}, sampler={"guidance": guidance}))
        for guidance in (1.0, 30.0)
    )
    assert np.array_equal(low, high) == (variant == "schnell")


def test_sampler_equals_the_stock_nodes(comfy_server: RunningServer) -> None:
    """FluxGuidance and KSampler with the same settings give the same picture, bit for bit."""
    prompt = demo_prompt()
    ours = picture(comfy_server, prompt)
    settings = prompt["sampler"]["inputs"]
    prompt["guidance"] = {"class_type": "FluxGuidance", "inputs": {"conditioning": ["text", 0], "guidance": 3.5}}
    prompt["empty"] = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["text", 0]}}
    kept = {name: value for name, value in settings.items() if name not in ("guidance", "positive")}
    links = {"positive": ["guidance", 0], "negative": ["empty", 0]}
    prompt["sampler"] = {"class_type": "KSampler", "inputs": kept | links}
    assert np.array_equal(ours, picture(comfy_server, prompt))


@pytest.mark.parametrize("name", [LEGACY_MODEL, EXTRA_MODEL])
def test_same_weights_from_another_place_give_the_same_picture(comfy_server: RunningServer, name: str) -> None:
    """A legacy folder, and a folder of extra_model_paths.yaml."""
    there = picture(comfy_server, demo_prompt(loader={"model_name": name}))
    assert np.array_equal(there, picture(comfy_server, demo_prompt()))


def stock_loader(server: RunningServer, dtype: str) -> dict[str, Any]:
    """ComfyUI's own loader with the dequantized demo model."""
    dense = server.models / "diffusion_models" / f"dense-{dtype}.safetensors"
    dequantize(server.demo_model, dense, dtype=dtype, force=True)
    return {"class_type": "UNETLoader", "inputs": {"unet_name": dense.name, "weight_dtype": "default"}}


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between two pictures, in steps of 1/255."""
    return np.abs(a.astype(int) - b.astype(int))


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_picture_equals_that_of_the_dequantized_model(comfy_server: RunningServer, dtype: str) -> None:
    prompt = demo_prompt(sampler={"seed": 51, "steps": 8})
    ours = picture(comfy_server, prompt)
    found = difference(ours, picture(comfy_server, prompt | {"loader": stock_loader(comfy_server, dtype)}))
    # Measured: float32 0 everywhere; bf16, which rounds the dense weights, at most 3 and 0.43 on average.
    assert found.max() <= {"float32": 1, "bf16": 6}[dtype]
    assert found.mean() <= {"float32": 0.01, "bf16": 0.9}[dtype]


def test_stock_lora_node_works_and_leaves_no_trace(comfy_server: RunningServer) -> None:
    plain = demo_prompt(sampler={"seed": 61})
    with_lora = demo_prompt(sampler={"seed": 61, "model": ["lora", 0]})
    inputs = {"model": ["loader", 0], "lora_name": LORA, "strength_model": 1.0}
    with_lora["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    changed = picture(comfy_server, with_lora)
    assert difference(changed, picture(comfy_server, plain)).mean() > 2

    # A seed that nothing has cached: this really runs on the model that had the LoRA.
    fresh = demo_prompt(sampler={"seed": 62})
    afterwards = picture(comfy_server, fresh)
    dense = {"loader": stock_loader(comfy_server, "float32")}
    assert difference(afterwards, picture(comfy_server, fresh | dense)).max() <= 1
    # Measured: 1 in a few pixels.
    assert difference(changed, picture(comfy_server, with_lora | dense)).max() <= 2
    assert "lora key not loaded" not in comfy_server.server.log_text()


def test_model_works_with_a_guider_and_custom_sampling(comfy_server: RunningServer) -> None:
    prompt = demo_prompt()
    ours = picture(comfy_server, prompt)
    prompt |= {
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
        "guidance": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["text", 0], "guidance": 3.5}},
        "guider": {
            "class_type": "BasicGuider",
            "inputs": {"model": ["loader", 0], "conditioning": ["guidance", 0]},
        },
        "algorithm": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "sigmas": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["loader", 0], "scheduler": "simple", "steps": 3, "denoise": 1.0},
        },
        "sampler": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["noise", 0],
                "guider": ["guider", 0],
                "sampler": ["algorithm", 0],
                "sigmas": ["sigmas", 0],
                "latent_image": ["latent", 0],
            },
        },
    }
    assert np.array_equal(ours, picture(comfy_server, prompt))


def test_negative_acts_above_cfg_1_only(comfy_server: RunningServer) -> None:
    plain = picture(comfy_server, demo_prompt(sampler={"seed": 31}))
    prompt = demo_prompt(sampler={"seed": 31, "negative": ["negative", 0]})
    prompt["negative"] = {"class_type": "SVDQDemoPrompt", "inputs": {"model": ["loader", 0], "text": "blurry"}}
    assert np.array_equal(plain, picture(comfy_server, prompt))
    prompt["sampler"]["inputs"]["cfg"] = 3.0
    assert not np.array_equal(plain, picture(comfy_server, prompt))
    # Without a negative there is nothing to guide away from, whatever the widget says.
    assert np.array_equal(plain, picture(comfy_server, demo_prompt(sampler={"seed": 31, "cfg": 3.0})))


def test_interrupt_stops_sampling_and_the_next_prompt_runs(comfy_server: RunningServer) -> None:
    def interrupt(event: Event) -> None:
        if event.type == "progress" and event.data["node"] == "sampler":
            comfy_server.client.interrupt()

    with pytest.raises(ExecutionInterrupted):
        comfy_server.client.run(demo_prompt(sampler={"steps": 10000, "seed": 41}), on_event=interrupt, timeout=60)
    comfy_server.wait_until_idle()
    assert picture(comfy_server, demo_prompt(sampler={"seed": 42})).std() > 5


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model_is_explained_in_one_line(comfy_server: RunningServer, name: str) -> None:
    with pytest.raises(ExecutionFailed) as failure:
        comfy_server.client.run(demo_prompt(loader={"model_name": name}), timeout=60)
    details = failure.value.details
    message = details["exception_message"].strip()
    assert details["node_type"] == "SVDQFluxLoader"
    assert details["exception_type"] == "svdq.CheckpointError"
    assert "\n" not in message
    assert name in message and BAD_MODELS[name] in message


def test_precision_that_cannot_run_is_refused_with_the_reason(comfy_server: RunningServer) -> None:
    with pytest.raises(ExecutionFailed) as failure:
        comfy_server.client.run(demo_prompt(loader={"precision": "int8"}), timeout=60)
    message = failure.value.details["exception_message"].strip()
    assert failure.value.details["exception_type"] == "svdq.BackendUnavailable"
    assert "int8" in message and "16bit" in message and "\n" not in message


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "no-such.safetensors", ""])
def test_name_that_is_not_listed_does_not_validate(comfy_server: RunningServer, name: str) -> None:
    with pytest.raises(PromptRejected) as refusal:
        comfy_server.client.queue(demo_prompt(loader={"model_name": name}))
    assert "value_not_in_list" in [error["type"] for error in refusal.value.node_errors["loader"]["errors"]]


@pytest.mark.parametrize("node", NODES)
def test_help_page_is_served(comfy_server: RunningServer, node: str) -> None:
    page = comfy_server.client.get(f"/extensions/{comfy_server.pack_name}/docs/{node}.md").decode()
    info = comfy_server.client.object_info(node)[node]
    assert page.startswith(f"# {info['display_name']}\n")
    inputs = info["input"]["required"] | info["input"].get("optional", {})
    assert [name for name in inputs if f"`{name}`" not in page] == []


def test_template_browser_gets_workflows_and_thumbnails(comfy_server: RunningServer) -> None:
    listed = comfy_server.client.get_json("/workflow_templates")[comfy_server.pack_name]
    assert sorted(listed) == [path.stem for path in WORKFLOWS]
    for name in listed:
        base = f"/api/workflow_templates/{comfy_server.pack_name}/{urllib.parse.quote(name)}"
        assert comfy_server.client.get_json(f"{base}.json")["version"] == 0.4
        thumbnail = comfy_server.client.get(f"{base}.jpg")
        assert Image.open(io.BytesIO(thumbnail)).format == "JPEG"
        assert len(thumbnail) < 60_000


def test_translations_are_served(comfy_server: RunningServer) -> None:
    translations = comfy_server.client.get_json("/i18n")
    for language in ("en", "de", "zh"):
        assert set(NODES) <= set(translations[language]["nodeDefs"])


def test_files_of_the_pack_are_not_served(comfy_server: RunningServer) -> None:
    with pytest.raises(urllib.error.HTTPError):
        comfy_server.client.get(f"/extensions/{comfy_server.pack_name}/../pyproject.toml")


def test_demo_model_is_what_the_demo_workflow_names(comfy_server: RunningServer) -> None:
    prompt = api_prompt(comfy_server, "SVDQ FLUX demo")
    assert prompt[find_node(prompt, "SVDQFluxLoader")]["inputs"]["model_name"] == DEMO_MODEL
