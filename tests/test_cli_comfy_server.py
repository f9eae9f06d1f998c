"""Starting and stopping the server: what goes wrong is said, and nothing keeps running. With a stand-in for ComfyUI."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from svdq.cli.comfy_server import ComfyServer, ServerFailed, import_error

# Answers like ComfyUI with no nodes of ours, after running whatever stands in BEFORE.
FAKE_COMFYUI = """
import json, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

{before}

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        nodes = {nodes} if self.path.startswith("/object_info") else {{}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(nodes).encode())

port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
WITH_PACK = {"SVDQFluxLoader": {}}


def fake_server(tmp_path: Path, before: str = "", nodes: object = WITH_PACK, **options: object) -> ComfyServer:
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    (comfyui / "main.py").write_text(FAKE_COMFYUI.format(before=before, nodes=nodes))
    return ComfyServer(tmp_path / "base", comfyui=comfyui, cpu=True, **options)


def test_starts_with_the_pack_installed_and_stops(tmp_path: Path) -> None:
    with fake_server(tmp_path, pack_name="my-pack") as server:
        assert server.is_running()
        assert server.client.system_stats() == {}
        assert (tmp_path / "base" / "custom_nodes" / "my-pack" / "__init__.py").is_file()
        assert not (tmp_path / "base" / "custom_nodes" / "my-pack" / ".git").exists()
    assert not server.is_running()
    with pytest.raises(OSError):
        server.client.system_stats()


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_takes_its_children_along(tmp_path: Path) -> None:
    child = "print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    with fake_server(tmp_path, before=child) as server:
        pid = int(server.log_text().split()[0])
        os.kill(pid, 0)
    gone_soon(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_ends_when_whoever_started_it_is_killed(tmp_path: Path) -> None:
    fake_server(tmp_path)
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import conftest
from pathlib import Path
from svdq.cli.comfy_server import ComfyServer
server = ComfyServer(Path({str(tmp_path / "base")!r}), comfyui=Path({str(tmp_path / "ComfyUI")!r}), cpu=True)
server.start()
print(server._process.pid, flush=True)
time.sleep(600)
"""
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(starter.stdout.readline())
    assert is_alive(pid)
    starter.kill()
    starter.communicate()
    gone_soon(pid)


def gone_soon(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """A killed process stays visible until whoever adopted it collects it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_comfyui_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed) as error:
        fake_server(tmp_path, before="print('\\x1b[31mno such option\\x1b[0m'); sys.exit(7)").start()
    first, *tail = str(error.value).splitlines()
    assert first == f"ComfyUI stopped with exit code 7; full log: {tmp_path / 'base' / 'comfyui.log'}"
    assert tail == ["no such option"]


def test_a_comfyui_that_never_answers_is_given_up_and_ended(tmp_path: Path) -> None:
    server = fake_server(tmp_path, before="import time; time.sleep(600)", start_timeout=0.5)
    with pytest.raises(ServerFailed, match=r"did not answer within 0 s|did not answer within 1 s"):
        server.start()
    assert not server.is_running()


def test_a_pack_that_cannot_be_imported_says_why(tmp_path: Path) -> None:
    lines = [
        "Traceback (most recent call last):",
        '  File "x.py", line 1, in <module>',
        "ImportError: no such thing",
        "",
    ]
    lines.append("[WARNING] Cannot import /base/custom_nodes/pack module for custom nodes: no such thing")
    with pytest.raises(ServerFailed) as error:
        fake_server(tmp_path, before=f"print({chr(10).join(lines)!r}, flush=True)", nodes={}).start()
    first, *details = str(error.value).splitlines()
    assert first.startswith("ComfyUI could not load this pack: ")
    assert "no such thing" in first
    assert details == lines


def test_the_import_error_is_found_in_the_log() -> None:
    assert import_error("x\n[WARNING] Error while calling comfy_entrypoint in /x: no\ny\n").endswith("in /x: no")
    assert import_error("all is well\n") is None


@pytest.mark.parametrize("cpu", [True, False])
def test_options_for_comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: bool) -> None:
    own = tmp_path / "their ComfyUI"
    for folder in ("comfy", "models/vae", "models/loras"):
        (own / folder).mkdir(parents=True)
    (own / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(own))
    (tmp_path / "base").mkdir()
    server = ComfyServer(
        tmp_path / "base", cpu=cpu, extra_arguments=["--lowvram"], model_folders={"vae": [tmp_path / "more"]}
    )
    command = server._command(1234)
    assert command[1] == str(own / "main.py")
    assert ("--cpu" in command) is cpu
    assert "--lowvram" in command
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((tmp_path / "base" / "extra_model_paths.yaml").read_text())
    assert config == {"svdq": {"vae": f"{tmp_path / 'more'}\n{own / 'models' / 'vae'}", "loras": f"{own}/models/loras"}}
    assert server._environ()["PYTHONDONTWRITEBYTECODE"] == "1"
