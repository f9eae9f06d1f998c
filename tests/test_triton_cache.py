"""A process finds the kernels in Triton's cache that another one has compiled: 10 to 20 s of a first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = Path(__file__).resolve().parent.parent / "kernels"


def keys() -> dict[str, str]:
    """What Triton calls each kernel, and each function of one, in its cache."""
    import importlib

    from triton.runtime.jit import JITFunction

    modules = [importlib.import_module(f"svdq.kernels.{path.stem}") for path in KERNELS.glob("[!_]*.py")]
    named = {f"{function.__module__}.{function.__name__}": function for module in modules
             for function in vars(module).values() if isinstance(function, JITFunction)}  # fmt: skip
    return {name: function.cache_key for name, function in sorted(named.items())}


def test_the_names_of_kernels_are_those_of_other_processes() -> None:
    """They hash the text of a kernel and the globals that it uses, among them whatever ``constexpr`` holds: the text of
    a function has its address."""
    here = keys()
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=True)
    there = json.loads(done.stdout)
    assert here.keys() == there.keys() and len(here) > 60
    for kernel in ("gluon_hopper.gemm_w8a8_hopper_kernel", "gemm_int4.gemm_w4a4_kernel", "quantize.quantize_kernel",
                   "quantize_int8.quantize_int8_kernel", "gemv.gemv_kernel", "weights_int8.expand_kernel"):  # fmt: skip
        assert f"svdq.kernels.{kernel}" in here
    assert [name for name in here if here[name] != there[name]] == []


if __name__ == "__main__":
    import conftest  # noqa: F401  makes the clone importable as svdq

    print(json.dumps(keys()))
