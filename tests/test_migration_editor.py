"""Workflows made for ComfyUI-nunchaku, opened in ComfyUI's editor."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from server_fixture import DEMO_MODEL, DEMO_VAE, LORA
from test_browser import Editor, browser, editor  # noqa: F401  (fixtures)
from test_migration import LEFT_OUT, NEW_STACK


class Workflow:
    """A workflow as the editor saves it, built node by node."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []

    def add(self, kind: str, outputs: str = "", widgets: list[Any] | None = None, **inputs: tuple[int, int]) -> int:
        """``inputs``: name -> (node, output slot). Returns the node's id."""
        number = len(self.nodes) + 1
        slots = []
        for name, (origin, slot) in inputs.items():
            output = self.nodes[origin - 1]["outputs"][slot]
            output["links"].append(len(self.links) + 1)
            self.links.append([len(self.links) + 1, origin, slot, number, len(slots), output["type"]])
            slots.append({"name": name, "type": output["type"], "link": len(self.links)})
        self.nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [(number - 1) % 4 * 420, (number - 1) // 4 * 420],
                "size": [360, 220],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": slots,
                "outputs": [{"name": name, "type": name, "links": []} for name in outputs.split()],
                "properties": {"Node name for S&R": kind},
                "widgets_values": widgets or [],
            }
        )
        return number

    def add_rest(self, model: int) -> None:
        """From the model to a saved picture."""
        text = self.add("SVDQDemoPrompt", "CONDITIONING", ["a test"], model=(model, 0))
        latent = self.add("EmptySD3LatentImage", "LATENT", [96, 64, 1])
        settings = [1, "fixed", 3, 3.5, "euler", "simple", 1, 1]
        links = {"model": (model, 0), "positive": (text, 0), "latent_image": (latent, 0)}
        sampler = self.add("SVDQFluxSampler", "LATENT", settings, **links)
        vae = self.add("VAELoader", "VAE", [DEMO_VAE])
        image = self.add("VAEDecode", "IMAGE", samples=(sampler, 0), vae=(vae, 0))
        self.add("SaveImage", "", ["migrated"], images=(image, 0))

    def as_dict(self) -> dict[str, Any]:
        count = {"last_node_id": len(self.nodes), "last_link_id": len(self.links)}
        return {**count, "nodes": self.nodes, "links": self.links, "groups": [], "extra": {}, "version": 0.4}


def open_file(editor: Editor, workflow: dict[str, Any]) -> None:  # noqa: F811
    """As if the file were dropped on the canvas."""
    if editor.find("[data-testid=template-workflows-content]"):
        from selenium.webdriver.common.keys import Keys

        editor.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        editor.wait(lambda: editor.find("[data-testid=dialog-overlay]") is None, "the template browser to close")
    editor.js(
        "return window.app.handleFile(new File([arguments[0]], 'old.json', {type: 'application/json'}))",
        json.dumps(workflow),
    )
    count = len(workflow["nodes"])
    editor.wait(lambda: len(editor.graph()["nodes"]) == count, "the workflow to open")


def click_when_free(editor: Editor, css: str) -> None:  # noqa: F811
    """Click an element that a message may cover for some seconds."""
    from selenium.common.exceptions import ElementClickInterceptedException

    def clicked() -> bool:
        element = editor.find(css)
        try:
            return element is not None and element.click() is None
        except ElementClickInterceptedException:
            return False

    editor.wait(clicked, css)


def replace_all(editor: Editor) -> str:  # noqa: F811
    """Click through the editor's offer to replace nodes; the text of the offer."""
    click_when_free(editor, "[data-testid=error-overlay-see-errors]")
    button = editor.wait(lambda: editor.find("button", text="Replace All"), "the offer to replace nodes")
    offer = editor.find("[data-testid=properties-panel]").text
    button.click()
    editor.wait(lambda: "Nunchaku" not in {n["type"][:8] for n in editor.graph()["nodes"]}, "the new nodes")
    return offer


def nodes_by_type(editor: Editor) -> dict[str, dict[str, Any]]:  # noqa: F811
    return {node["type"]: node for node in editor.graph()["nodes"]}


@pytest.mark.browser
@pytest.mark.server
def test_old_workflow_from_file_to_picture(editor: Editor) -> None:  # noqa: F811
    workflow = Workflow()
    loader = workflow.add(
        "NunchakuFluxDiTLoader", "MODEL", [DEMO_MODEL, 0.12, "nunchaku-fp16", "auto", 0, "bfloat16", "enabled"]
    )
    single = workflow.add("NunchakuFluxLoraLoader", "MODEL", [LORA, 0.8], model=(loader, 0))
    slots = NEW_STACK | {"lora_name_2": LORA, "lora_strength_2": -0.3}
    stack = workflow.add("NunchakuFluxLoraStack", "MODEL", list(slots.values()), model=(single, 0))
    encoders = ["flux.1", "t5xxl_fp8_e4m3fn.safetensors", "clip_l.safetensors", 384]
    clip = workflow.add("NunchakuTextEncoderLoaderV2", "CLIP", encoders)
    workflow.add("CLIPTextEncode", "CONDITIONING", ["not used: the encoders are stand-ins"], clip=(clip, 0))
    workflow.add_rest(stack)

    open_file(editor, workflow.as_dict())
    offer = replace_all(editor).replace("\n", "")
    for old in ("NunchakuFluxDiTLoader", "NunchakuFluxLoraLoader", "NunchakuFluxLoraStack"):
        assert old in offer
    assert editor.complaints() == ""
    nodes = nodes_by_type(editor)
    assert nodes["SVDQNunchakuFluxLoader"]["widgets_values"] == [DEMO_MODEL, 0.12, 0, "bfloat16", LEFT_OUT]
    assert nodes["LoraLoaderModelOnly"]["widgets_values"] == [LORA, 0.8]
    assert nodes["SVDQNunchakuLoraStack"]["widgets_values"] == [*slots.values(), ""]
    assert nodes["SVDQNunchakuTextEncoders"]["widgets_values"] == [*encoders[1:], ""]
    migrated = editor.graph()
    assert sorted(migrated["links"]) == workflow.links  # newer editors have another order

    click_when_free(editor, "[data-testid=queue-button]")
    assert editor.wait(editor.pictures, "a picture in the Save Image node")[0]["width"] == 96
    assert editor.complaints() == ""
    open_file(editor, migrated)
    editor.js("return new Promise(resolve => setTimeout(resolve, 1000))")  # complaints come a moment later
    assert editor.complaints() == ""
    assert nodes_by_type(editor)["SVDQNunchakuFluxLoader"]["widgets_values"][-1] == LEFT_OUT


@pytest.mark.browser
@pytest.mark.server
def test_node_without_equivalent_says_so_and_can_be_bypassed(editor: Editor) -> None:  # noqa: F811
    workflow = Workflow()
    loader = workflow.add("NunchakuFluxDiTLoader", "MODEL", [DEMO_MODEL, 0, "nunchaku-fp16", "auto", 0, "bfloat16"])
    face = workflow.add("LoadImage", "IMAGE MASK", ["example.png", "image"])
    files = ["pulid.safetensors", "eva.pt", "gpu"]
    pulid = workflow.add("NunchakuPuLIDLoaderV2", "MODEL PULID_PIPELINE", files, model=(loader, 0))
    links = {"model": (pulid, 0), "pulid_pipline": (pulid, 1), "image": (face, 0)}
    applied = workflow.add("NunchakuFluxPuLIDApplyV2", "MODEL", [1, 0, 1], **links)
    depth = workflow.add("NunchakuDepthPreprocessor", "IMAGE", ["depth-anything"], image=(face, 0))
    workflow.add("PreviewImage", images=(depth, 0))
    workflow.add_rest(applied)

    open_file(editor, workflow.as_dict())
    replace_all(editor)
    named = [n["widgets_values"][0] for n in editor.graph()["nodes"] if n["type"] == "SVDQNunchakuNoEquivalent"]
    assert named == ["NunchakuPuLIDLoaderV2", "NunchakuFluxPuLIDApplyV2", "NunchakuDepthPreprocessor"]
    click_when_free(editor, "[data-testid=queue-button]")
    click_when_free(editor, "[data-testid=error-overlay-see-errors]")
    editor.wait(lambda: editor.find("[aria-label^='Info for No Equivalent']"), "the errors by node")
    closed = "[aria-label^='Info for No Equivalent'][aria-expanded=false]"

    def all_read() -> bool:
        """Opens one more entry at a time; a click that comes too soon closes one, and it is opened again."""
        from selenium.common.exceptions import ElementClickInterceptedException

        panel = editor.find("[data-testid=properties-panel]")
        if all(f"{node} has no equivalent: use" in panel.text for node in named):
            return True
        button = editor.find(closed)
        if button:
            with contextlib.suppress(ElementClickInterceptedException):
                button.click()
        return False

    editor.wait(all_read, "what to use instead")

    editor.js("for (const n of window.app.graph._nodes) if (n.type === 'SVDQNunchakuNoEquivalent') n.mode = 4")
    click_when_free(editor, "[data-testid=queue-button]")
    assert editor.wait(editor.pictures, "a picture in the Save Image node")[0]["width"] == 96
