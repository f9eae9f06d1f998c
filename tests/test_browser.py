"""The editor in headless Chromium: what a person does on the first day, with mouse clicks."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from server_fixture import RunningServer, unavailable

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

pytestmark = [pytest.mark.browser, pytest.mark.server]

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SCREENSHOT = ROOT / "out" / "browser.png"
WINDOW = (1600, 1000)
PATIENCE = 60.0


class Editor:
    """ComfyUI's page. Elements are found by what the page's own tests use (data-testid) or by what a person reads."""

    def __init__(self, browser: Chrome, server: RunningServer) -> None:
        self.browser = browser
        self.server = server

    def open(self) -> None:
        """Load the page and wait until the editor works."""
        self.browser.get(self.server.url)
        self.wait(lambda: self.js("return !!(window.app?.graph && window.app.extensionManager)"), "the editor to start")
        self.wait(lambda: self.find("[data-testid=queue-button]"), "the Run button")

    def open_template(self, name: str) -> None:
        """Open a workflow of this pack from the template browser, which is open already on a first visit."""
        self.wait(self._template_browser, "the template browser")
        category = "[role=dialog] [role=button]"
        self.wait(lambda: self._clicked(self.find(category, text=self.server.pack_name)), "this pack's templates")
        self.click(f"[data-testid='template-workflow-{name}']")
        self.wait(lambda: self.find("[data-testid=dialog-overlay]") is None, "the template browser to close")
        types = sorted(node["type"] for node in workflow_file(name)["nodes"])
        self.wait(lambda: sorted(node["type"] for node in self.graph()["nodes"]) == types, f"the nodes of {name}")

    def _template_browser(self) -> bool:
        if self.find("[data-testid=template-workflows-content]"):
            return True
        if not self.find("[data-testid=dialog-overlay]"):
            # One attempt: on a first visit the page may open it in this moment, over the button.
            self._clicked(self.find("[data-testid=side-toolbar] [aria-label=Templates]"))
        return False

    def graph(self) -> dict[str, Any]:
        """The workflow in the editor, as it would be saved."""
        return json.loads(self.js("return JSON.stringify(window.app.graph.serialize())"))

    def complaints(self) -> str:
        """Text of whatever the editor has to say against the workflow: missing nodes, missing models, errors."""
        found = self.browser.find_elements("css selector", "[data-testid=error-overlay], [role=dialog]")
        return "\n".join(element.text for element in found)

    def pictures(self) -> list[dict[str, Any]]:
        """Address and width of each picture that a node of type SaveImage has loaded."""
        return self.js(
            "return window.app.graph._nodes.filter(node => node.type === 'SaveImage')"
            ".flatMap(node => node.imgs ?? []).map(image => ({src: image.src, width: image.naturalWidth}))"
            ".filter(image => image.width > 0)"
        )

    def node_box(self, node_type: str) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the one node of this type in the page, title bar included."""
        box = self.js(
            "const node = window.app.graph._nodes.find(node => node.type === arguments[0]);"
            "const canvas = window.app.canvas, page = canvas.canvas.getBoundingClientRect();"
            "const {scale, offset} = canvas.ds;"
            "const x = (node.pos[0] + offset[0]) * scale + page.left, y = (node.pos[1] + offset[1]) * scale + page.top;"
            "return [x, y - 30 * scale, x + node.size[0] * scale, y + node.size[1] * scale]",
            node_type,
        )
        left, top, right, bottom = (round(value) for value in box)
        return left, top, right, bottom

    def colourfulness(self, node_type: str) -> float:
        """Mean distance of the node's pixels from grey, as a person would see them."""
        screen = Image.open(io.BytesIO(self.browser.get_screenshot_as_png())).convert("RGB")
        pixels = np.asarray(screen.crop(self.node_box(node_type))).astype(float)
        return float(np.ptp(pixels, axis=2).mean())

    def find(self, css: str, text: str | None = None) -> WebElement | None:
        """The first visible element that matches, with exactly this text if given."""
        for element in self.browser.find_elements("css selector", css):
            if element.is_displayed() and text in (None, element.text.strip()):
                return element
        return None

    def click(self, css: str) -> None:
        """Click an element as soon as it is there and nothing covers it, such as the splash of a page that loads."""
        self.wait(lambda: self._clicked(self.find(css)), f"{css} to be clickable")

    def _clicked(self, element: WebElement | None) -> bool:
        from selenium.common.exceptions import ElementClickInterceptedException

        if element is None:
            return False
        try:
            element.click()
        except ElementClickInterceptedException:
            return False
        return True

    def js(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page."""
        return self.browser.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
        """The condition's first true value; fails with ``what`` was missing and a screenshot."""
        from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.browser, patience, 0.2, ignored_exceptions=[StaleElementReferenceException])
        try:
            return waiting.until(lambda _: condition())
        except TimeoutException:
            failure = SCREENSHOT.with_name("browser-failure.png")
            self.save_screenshot(failure)
            pytest.fail(f"waited {patience:.0f} s for {what}; see {failure}; the page says: {self.complaints()!r}")

    def save_screenshot(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self.browser.save_screenshot(str(path))


def workflow_file(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    """Headless Chromium; it cannot reach anything but this machine."""
    if importlib.util.find_spec("selenium") is None:
        unavailable("selenium is not installed: run `python3 . test`")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        unavailable("no Chromium or no chromedriver: on Debian, apt-get install chromium chromium-driver")

    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",  # containers run as root
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--lang=en-US",
        f"--window-size={WINDOW[0]},{WINDOW[1]}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


@pytest.fixture
def editor(browser: Chrome, comfy_server: RunningServer) -> Editor:
    """A freshly loaded page."""
    editor = Editor(browser, comfy_server)
    editor.open()
    return editor


def test_demo_from_template_browser_to_picture(editor: Editor) -> None:
    editor.open_template("SVDQ FLUX demo")
    assert editor.complaints() == ""
    empty = editor.colourfulness("SaveImage")
    editor.click("[data-testid=queue-button]")
    picture = editor.wait(editor.pictures, "a picture in the Save Image node")[0]
    assert picture["width"] == 128
    editor.server.wait_until_idle()
    editor.wait(lambda: editor.colourfulness("SaveImage") > empty + 2, "the picture to be drawn")
    editor.save_screenshot(SCREENSHOT)
    assert editor.complaints() == ""
    own = [entry for entry in editor.browser.get_log("browser") if "/extensions/" in entry["message"]]
    assert [entry for entry in own if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_template_opens_as_it_was_saved(editor: Editor, name: str) -> None:
    """No missing node or model, no widget that moved, no link that fell off."""
    editor.open_template(name)
    editor.js("return new Promise(resolve => setTimeout(resolve, 1000))")  # complaints come a moment later
    assert editor.complaints() == ""
    opened, saved = editor.graph(), workflow_file(name)
    assert sorted(opened["links"]) == sorted(saved["links"])  # newer editors have another order
    for field in ("widgets_values", "pos", "title", "properties", "mode"):
        # And [] where a node has no widgets.
        values = ({node["id"]: node.get(field) or None for node in graph["nodes"]} for graph in (opened, saved))
        assert next(values) == next(values), field
    slots = ({node["id"]: [entry["name"] for entry in node["inputs"]] for node in g["nodes"]} for g in (opened, saved))
    assert next(slots) == next(slots)


@pytest.mark.parametrize("nodes_2", [False, True], ids=["canvas", "Nodes 2.0"])
def test_no_node_of_a_template_covers_another(editor: Editor, nodes_2: bool) -> None:
    setting = "return window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', arguments[0])"
    editor.js(setting, nodes_2)
    try:
        for path in WORKFLOWS:
            workflow = workflow_file(path.stem)
            count = len(workflow["nodes"])
            load = "return window.app.handleFile(new File([arguments[0]], 'x.json', {type: 'application/json'}))"
            editor.js(load, json.dumps(workflow))
            boxes = editor.wait(lambda n=count: _settled_boxes(editor, nodes_2, n), "the nodes to be drawn")
            names = sorted(boxes)
            covered = [(a, b) for a in names for b in names if a < b and _overlap(boxes[a], boxes[b])]
            assert covered == [], path.stem
    finally:
        editor.js(setting, False)


def _settled_boxes(editor: Editor, nodes_2: bool, count: int) -> dict[str, list[float]]:
    """Left, top, right, bottom of each node with its title, in the graph's units; {} unless ``count`` stand still."""
    measure = (
        "return Object.fromEntries([...document.querySelectorAll('[data-node-id]')].map(element => {"
        "  const box = element.getBoundingClientRect(), scale = window.app.canvas.ds.scale;"
        "  return [element.dataset.nodeId, [box.left, box.top, box.right, box.bottom].map(x => x / scale)]}))"
        if nodes_2
        else "return Object.fromEntries(window.app.graph._nodes.map(({id, pos, size}) =>"
        "  [id, [pos[0], pos[1] - 30, pos[0] + size[0], pos[1] + size[1]]]))"
    )
    before = editor.js(measure)
    editor.js("return new Promise(resolve => setTimeout(resolve, 500))")
    after = editor.js(measure)
    return after if len(after) == count and after == before else {}


def _overlap(one: list[float], other: list[float]) -> bool:
    """Whether the rectangles have more in common than the width of a border."""
    return all(min(one[i + 2], other[i + 2]) - max(one[i], other[i]) > 1 for i in (0, 1))


def test_help_page_opens_beside_the_node(editor: Editor) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    editor.open_template("SVDQ FLUX demo")
    left, top, _, _ = editor.node_box("SVDQFluxSampler")
    ActionChains(editor.browser).move_by_offset(left + 60, top + 12).click().perform()
    editor.click("[data-testid=info-button]")
    editor.wait(lambda: editor.find("h1", text="SVDQ FLUX Sampler"), "the help page")
