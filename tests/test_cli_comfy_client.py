"""What the server says over its websocket, from bytes as ComfyUI 0.30 sends them (server.py, protocol.py)."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
from collections.abc import Iterator

import pytest

from svdq.cli.comfy_client import ComfyClient, Event

NODE, TEXT, PREVIEW = "ünit 7", "watching activations for double_blocks.0 – läuft", b"\xff\xd8 a picture"
MESSAGES = [
    json.dumps({"type": "progress", "data": {"node": NODE, "value": 1, "max": 2}}),
    struct.pack(">II", 1, 1) + PREVIEW,
    struct.pack(">II", 3, len(NODE.encode())) + NODE.encode() + TEXT.encode(),
    struct.pack(">II", 4, 2) + b"{}" + PREVIEW,  # of a type that nobody here needs
    json.dumps({"type": "executed", "data": {"node": NODE}}),
]


@pytest.fixture
def url() -> Iterator[str]:
    """A server that sends MESSAGES to whoever listens."""
    web = pytest.importorskip("aiohttp.web", reason="no aiohttp: it comes with ComfyUI")
    loop, address, runners = asyncio.new_event_loop(), [], []
    ready = threading.Event()

    async def send(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for message in MESSAGES:
            await (socket.send_bytes if isinstance(message, bytes) else socket.send_str)(message)
        async for _ in socket:  # until whoever listens is gone
            pass
        return socket

    async def serve() -> None:
        application = web.Application()
        application.router.add_get("/ws", send)
        runner = web.AppRunner(application, shutdown_timeout=0)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address.append(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")
        ready.set()

    def work() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(10)
    yield address[0]
    asyncio.run_coroutine_threadsafe(runners[0].cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def test_events(url: str) -> None:
    with ComfyClient(url).events() as next_event:
        found = [next_event(10) for _ in range(4)]
    assert found == [
        Event("progress", {"node": NODE, "value": 1, "max": 2}),
        Event("preview", PREVIEW),
        Event("text", {"node": NODE, "text": TEXT}),
        Event("executed", {"node": NODE}),
    ]
