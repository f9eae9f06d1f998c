"""A small client of ComfyUI's HTTP and websocket API: what the demo and the tests need, synchronously."""

from __future__ import annotations

import asyncio
import json
import math
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Never through a proxy: the server is on this machine.
_open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class ComfyError(RuntimeError):
    """ComfyUI could not do what was asked."""


class PromptRejected(ComfyError):
    """ComfyUI's validation refused a prompt; ``node_errors`` is its own account, node id -> errors."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.node_errors: dict[str, Any] = answer.get("node_errors") or {}
        error = answer.get("error", {})
        message = error if isinstance(error, str) else f"{error.get('message')} {error.get('details') or ''}".strip()
        lines = [message or "prompt refused"]
        for node, found in self.node_errors.items():
            reasons = "; ".join(f"{e.get('message')}: {e.get('details')}" for e in found.get("errors", []))
            lines.append(f"node {node} ({found.get('class_type')}): {reasons}")
        super().__init__(" | ".join(lines))


class ExecutionFailed(ComfyError):
    """A node raised while a prompt ran; ``details`` is the event with exception type, message and traceback."""

    def __init__(self, details: dict[str, Any]) -> None:
        self.details = details
        message = str(details.get("exception_message", "")).strip()
        super().__init__(f"{details.get('node_type')}: {message}")


class ExecutionInterrupted(ComfyError):
    """Somebody interrupted the prompt."""


class ConnectionLost(ComfyError):
    """The server closed the connection, most likely because its process ended."""


@dataclass(frozen=True)
class Event:
    """One websocket message. data: its JSON, the bytes of an image when ``type`` is "preview", or what a node says,
    {"node": id, "text": str}, when it is "text"."""

    type: str
    data: Any


class ComfyClient:
    """Talks to one server as one client; ``client_id`` decides whose events arrive."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.client_id = uuid.uuid4().hex

    def get(self, path: str, timeout: float = 60.0) -> bytes:
        """Body of a GET request."""
        return self._request(urllib.request.Request(self.url + path), timeout)

    def get_json(self, path: str, timeout: float = 60.0) -> Any:
        """JSON answer of a GET request."""
        return json.loads(self.get(path, timeout))

    def post_json(self, path: str, data: Any, timeout: float = 60.0) -> Any:
        """POST ``data`` as JSON; the JSON answer, or None if there is no body."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(data).encode(), headers)
        body = self._request(request, timeout)
        return json.loads(body) if body else None

    def _request(self, request: urllib.request.Request, timeout: float) -> bytes:
        with _open_url(request, timeout=timeout) as response:
            return response.read()

    def system_stats(self) -> dict[str, Any]:
        """Versions, RAM and devices."""
        return self.get_json("/system_stats")

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """Node class -> its description, for all nodes or for one; a class that is not registered is absent."""
        return self.get_json("/object_info" if node is None else f"/object_info/{urllib.parse.quote(node)}")

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt in API format; returns its id. Raises PromptRejected if it does not validate."""
        try:
            answer = self.post_json("/prompt", {"prompt": prompt, "client_id": self.client_id})
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRejected(json.loads(error.read())) from None
        return answer["prompt_id"]

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What is known about a finished prompt (``outputs``, ``status``), None before that."""
        return self.get_json(f"/history/{prompt_id}").get(prompt_id)

    def image(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """An image file, with the three values that history and "executed" events name it by."""
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type})
        return self.get(f"/view?{query}")

    def interrupt(self) -> None:
        """Stop the running prompt."""
        self.post_json("/interrupt", {})

    def free(self) -> None:
        """Unload all models and drop cached results."""
        self.post_json("/free", {"unload_models": True, "free_memory": True})

    @contextmanager
    def events(self) -> Iterator[Callable[[float], Event]]:
        """Listen while the block runs; yields ``next_event(timeout)``, which raises TimeoutError or ConnectionLost."""
        arrived: queue.Queue[Event | None] = queue.Queue()
        connected = threading.Event()
        loop = asyncio.new_event_loop()
        listener = loop.create_task(self._listen(arrived, connected))

        def work() -> None:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(asyncio.gather(listener, return_exceptions=True))
            arrived.put(None)
            connected.set()

        def next_event(timeout: float) -> Event:
            try:
                event = arrived.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"no event from ComfyUI for {timeout:.0f} s") from None
            if event is None:
                raise ConnectionLost("ComfyUI closed the connection")
            return event

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        connected.wait(30.0)
        try:
            yield next_event
        finally:
            loop.call_soon_threadsafe(listener.cancel)
            thread.join()
            loop.close()

    async def _listen(self, arrived: queue.Queue[Event | None], connected: threading.Event) -> None:
        import aiohttp

        url = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            connected.set()
            async for message in socket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    parsed = json.loads(message.data)
                    arrived.put(Event(parsed["type"], parsed["data"]))
                elif message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == b"\0\0\0\1":
                    # Event type 1 is a preview: four bytes image format, then the image.
                    arrived.put(Event("preview", message.data[8:]))
                elif message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == b"\0\0\0\3":
                    # Event type 3 is a text of a node: four bytes length of its id, the id, the text.
                    end = 8 + int.from_bytes(message.data[4:8], "big")
                    node, text = message.data[8:end].decode(), message.data[end:].decode()
                    arrived.put(Event("text", {"node": node, "text": text}))

    def run(
        self,
        prompt: dict[str, Any],
        on_event: Callable[[Event], None] | None = None,
        on_wait: Callable[[], None] | None = None,
        timeout: float = math.inf,
    ) -> dict[str, Any]:
        """Queue a prompt, wait until it is done, and return its history entry.

        ``on_event`` gets every event of this prompt, ``on_wait`` is called about once a second while there is none.
        Raises PromptRejected, ExecutionFailed, ExecutionInterrupted, ConnectionLost or TimeoutError.
        """
        deadline = time.monotonic() + timeout
        with self.events() as next_event:
            prompt_id = self.queue(prompt)
            while True:
                try:
                    event = next_event(1.0)
                except TimeoutError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"prompt {prompt_id} is not done after {timeout:.0f} s") from None
                    if on_wait is not None:
                        on_wait()
                    continue
                if event.type != "preview" and event.data.get("prompt_id", prompt_id) != prompt_id:
                    continue
                if on_event is not None:
                    on_event(event)
                if event.type == "execution_error":
                    raise ExecutionFailed(event.data)
                if event.type == "execution_interrupted":
                    raise ExecutionInterrupted("the prompt was interrupted")
                if event.type == "execution_success":
                    return self._finished(prompt_id)

    def _finished(self, prompt_id: str) -> dict[str, Any]:
        # The success event is sent a moment before the history entry is written.
        deadline = time.monotonic() + 30.0
        while (entry := self.history(prompt_id)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"prompt {prompt_id} ended but has no history entry")
            time.sleep(0.02)
        return entry


def images_of(entry: dict[str, Any]) -> list[dict[str, str]]:
    """The images of a history entry, each as keyword arguments of ``ComfyClient.image``."""
    outputs = entry.get("outputs", {}).values()
    keys = ("filename", "subfolder", "type")
    return [{key: image[key] for key in keys} for output in outputs for image in output.get("images", [])]
