"""A process finds the kernels in Triton's cache that another one has compiled: 10 to 20 s of a first step."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = Path(__file__).resolve().parent.parent / "kernels"


def keys(first: str) -> dict[str, str]:
    """What Triton calls each kernel, and each function of one, in its cache. first: the module that is used first."""
    from triton.runtime.jit import JITFunction

    importlib.import_module(f"svdq.kernels.{first}")
    importlib.import_module("svdq.kernels.layers")
    modules = [importlib.import_module(f"svdq.kernels.{path.stem}") for path in KERNELS.glob("[!_]*.py")]
    # From the top: the functions that a kernel calls get their names after it, if they have none.
    functions = [f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)]
    functions.sort(key=lambda f: (first not in f.__module__, not f.__name__.endswith("kernel")))
    return {f"{f.__module__}.{f.__name__}": f.cache_key for f in functions}


def test_the_names_of_kernels_are_those_of_other_processes() -> None:
    """They hash the text of a kernel and the globals that it uses, among them whatever ``constexpr`` holds: the text of
    a function has its address. And they differ by which functions have been named before."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, first],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        for first, seed in (("gluon_hopper", "1"), ("gemm_quantize", "2"), ("quantize", "3"))
    ]
    found = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert found[0].keys() == found[1].keys() == found[2].keys() and len(found[0]) > 60
    for kernel in ("gluon_hopper.gemm_w8a8_hopper_kernel", "gemm_int4.gemm_w4a4_kernel", "quantize.quantize_kernel",
                   "quantize_int8.quantize_int8_kernel", "gemv.gemv_kernel", "weights_int8.expand_kernel"):  # fmt: skip
        assert f"svdq.kernels.{kernel}" in found[0]
    for other in found[1:]:
        assert [name for name, key in found[0].items() if other[name] != key] == []


if __name__ == "__main__":
    import conftest  # noqa: F401  makes the clone importable as svdq

    print(json.dumps(keys(sys.argv[1])))
