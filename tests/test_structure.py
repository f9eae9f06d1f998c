"""The house rules that a program can check: who imports whom, what is imported when, how long files are."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, find_comfyui

# Folder -> modules of ours that it may import, by prefix.
OWN = {
    "kernels": ["kernels"],
    "loaders": ["loaders", "kernels.int4", "kernels.layout"],
    "model": ["model", "loaders", "kernels"],
    "quantizer": ["quantizer", "loaders", "kernels.int4", "kernels.layout", "kernels.reference", "kernels.feedback"],
    "nodes": ["nodes", "model", "quantizer", "loaders", "kernels"],
    "cli": ["cli", "quantizer", "loaders", "kernels", "benchmarks"],  # bench alone uses benchmarks
}
COMFYUI = ["comfy", "comfy_aimdo", "comfy_api", "comfy_kitchen", "folder_paths", "node_helpers", "nodes", "server"]
# Folder -> packages from outside.
THIRD_PARTY = {
    "kernels": ["torch", "triton"],
    "loaders": ["torch", "safetensors"],
    "model": ["torch", *COMFYUI],
    "quantizer": ["torch", "safetensors"],
    "nodes": ["torch", *COMFYUI],
    "cli": ["torch", "safetensors", "aiohttp", "pytest"],
}
# doctor reports which Triton there is.
TRITON_OUTSIDE_KERNELS = ["cli/doctor.py"]
MOST_LINES = 500
LONGER: dict[str, str] = {}  # file -> why it is not split


@dataclass(frozen=True)
class Import:
    """file: path from the root · line · level: leading dots · module: what is imported, from the root if level > 0 ·
    at_top: whether importing the file imports it."""

    file: str
    line: int
    level: int
    module: str
    at_top: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def _package_files() -> list[Path]:
    return sorted(path for folder in OWN for path in (ROOT / folder).rglob("*.py"))


def _imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {id(node) for part in ast.walk(tree) if _runs_later(part) for node in ast.walk(part)}
    file = path.relative_to(ROOT).as_posix()
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree):
        at_top = id(node) not in later
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, 0, alias.name, at_top)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            assert node.level <= len(package) + 1, f"{file}:{node.lineno} leaves the package"
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # "from ..kernels import layout" imports kernels.layout, "from .int4 import GROUP" imports kernels.int4.
                target = ROOT / module.replace(".", "/") / alias.name
                submodule = node.level > 0 and (target.is_dir() or target.with_suffix(".py").is_file())
                name = f"{module}.{alias.name}".lstrip(".") if submodule else module
                yield Import(file, node.lineno, node.level, name, at_top)


def _runs_later(node: ast.AST) -> bool:
    """Function bodies, and what only a type checker sees."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def _is_in(module: str, prefixes: list[str]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return [found for path in _package_files() for found in _imports(path)]


def test_the_rules_see_the_imports(imports: list[Import]) -> None:
    found = {(i.file, i.module, i.at_top) for i in imports}
    assert ("loaders/nunchaku.py", "kernels.layout", True) in found
    assert ("kernels/reference.py", "torch", True) in found
    assert ("cli/synth.py", "cli.synth_weights", False) in found
    assert ("cli/synth.py", "loaders.weights", False) in found
    assert ("quantizer/solve.py", "kernels.reference", True) in found


def test_imports_go_downwards_only(imports: list[Import]) -> None:
    wrong = [i for i in imports if i.level and not _is_in(i.module, OWN[i.file.partition("/")[0]])]
    assert [str(i) for i in wrong] == []


def test_imports_are_relative(imports: list[Import]) -> None:
    ours = [*OWN, "svdq", "tests", "benchmarks"]
    absolute = [i for i in imports if not i.level and _is_in(i.module, ours)]
    # ComfyUI's own module "nodes" has the name of our folder; absolute, it is ComfyUI's.
    assert [str(i) for i in absolute if i.module != "nodes" or not i.file.startswith("nodes/")] == []


def test_third_party_imports(imports: list[Import]) -> None:
    wrong = [
        i for i in imports
        if not i.level
        and i.module.partition(".")[0] not in sys.stdlib_module_names
        and not _is_in(i.module, THIRD_PARTY[i.file.partition("/")[0]])
        and not (i.module == "triton" and i.file in TRITON_OUTSIDE_KERNELS)
    ]  # fmt: skip
    assert [str(i) for i in wrong] == []


def test_command_modules_import_only_the_standard_library_at_first(imports: list[Import]) -> None:
    from svdq.cli import COMMANDS

    files = {f"cli/{name}.py" for name in COMMANDS} | {"cli/__init__.py", "__main__.py"}
    wrong = [i for i in imports if i.file in files and i.at_top and not _is_in(i.module, ["cli"])]
    assert [str(i) for i in wrong if i.module.partition(".")[0] not in sys.stdlib_module_names] == []


@pytest.mark.parametrize("path", _package_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    name = path.relative_to(ROOT).as_posix()
    if lines > MOST_LINES:
        assert name in LONGER, f"{name} has {lines} lines: split it"
    else:
        assert name not in LONGER, f"{name} is short again: take it off the list"


def launches() -> Iterator[tuple[str, ast.Call]]:
    """All calls kernel[grid](...) in kernels/."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            keywords = {keyword.arg for keyword in node.keywords} if isinstance(node, ast.Call) else set()
            if "num_warps" in keywords and isinstance(node.func, ast.Subscript):
                yield f"{path.name}:{node.lineno}", node


def test_kernels_do_not_depend_on_a_default_of_triton() -> None:
    """Triton 3.9 warns that it will round a * b + c twice some day, which takes longer and gives other bits."""
    found = list(launches())
    assert len(found) >= 12
    without = [
        place
        for place, call in found
        if not any(keyword.arg is None and ast.unparse(keyword.value) == "FMA" for keyword in call.keywords)
    ]
    assert not without


def test_bare_import() -> None:
    """Without ComfyUI, without Triton and without a GPU, and without looking for one."""
    script = f"""
import importlib.abc, sys, types
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "comfy", "comfy_kitchen", "comfy_api", "folder_paths", "aiohttp"):
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
package = types.ModuleType("svdq"); package.__path__ = [{str(ROOT)!r}]; sys.modules["svdq"] = package
import svdq.kernels.reference, svdq.loaders.write, svdq.loaders.demo_assets, svdq.cli.synth_weights, svdq.cli.doctor
import svdq.quantizer.job
import torch
assert not torch.cuda.is_initialized()
"""
    _run(script, CUDA_VISIBLE_DEVICES="")


@pytest.mark.comfy
def test_comfyui_loads_the_pack_under_any_folder_name(tmp_path: Path) -> None:
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI")
    folder = tmp_path / "custom_nodes" / "ComfyUI-svdq flux.1"
    folder.mkdir(parents=True)
    for entry in ROOT.iterdir():
        if not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    # The way of ComfyUI's nodes.load_custom_node, without starting a server.
    script = f"""
import asyncio, importlib.util, json, sys
sys.path.insert(0, {str(comfyui)!r})
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
path = {str(folder)!r}
name = path.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, path + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
assert not hasattr(module, "NODE_CLASS_MAPPINGS"), "it would hide the V3 nodes"
assert "svdq" not in sys.modules
extension = asyncio.run(module.comfy_entrypoint())
print(json.dumps([node.GET_SCHEMA().node_id for node in asyncio.run(extension.get_node_list())]))
"""
    nodes = json.loads(_run(script).splitlines()[-1])
    assert {"SVDQFluxLoader", "SVDQFluxSampler"} <= set(nodes)


def _run(script: str, **environ: str) -> str:
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ}, cwd=ROOT.parent)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout
