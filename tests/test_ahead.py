"""Kernels are compiled side by side before they are needed: real compilations, for a GPU that is not there."""

from __future__ import annotations

import importlib
import inspect
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
compiler = pytest.importorskip("triton.backends.compiler")
runtime = pytest.importorskip("triton.runtime.driver")
parallel = pytest.importorskip("triton.runtime._async_compile")
ahead = importlib.import_module("svdq.kernels.ahead")


@triton.jit
def add_kernel(x, y, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(y + offsets, tl.load(x + offsets) + tl.load(y + offsets))


@triton.jit
def broken_kernel(x, SIZE: tl.constexpr):
    tl.store(x, tl.arange(0, SIZE + 1))  # not a power of two


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """An sm_80 GPU as far as compiling goes, an empty cache, and the kernels as new."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "_seen", set())
    gpu = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: compiler.GPUTarget("cuda", 80, 32),
    )
    monkeypatch.setattr(runtime.driver, "_active", gpu)
    for kernel in (add_kernel, broken_kernel):
        kernel.device_caches.clear()
    yield add_kernel
    for kernel in (add_kernel, broken_kernel):
        kernel.device_caches.clear()


def compiled(kernel) -> int:
    return len(kernel.device_caches[0][0])


SIZES = (16, 32, 64, 128)


def start(sizes=SIZES) -> None:
    values = torch.zeros(128)
    for size in sizes:
        add_kernel[(1,)](values, values, size)


def test_all_are_compiled_by_several_threads_and_none_is_started(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, compile_kernel = set(), triton.compiler.compile

    def compile_here(*args, **options):
        seen.add(threading.get_ident())
        return compile_kernel(*args, **options)

    monkeypatch.setattr(triton.compiler, "compile", compile_here)
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 4)
    run = ahead.JITFunction.run
    ahead.compile_once("key", start)
    assert ahead.JITFunction.run is run
    assert compiled(kernels) == len(SIZES)
    assert len(seen) > 1 and threading.get_ident() not in seen
    forms = list(kernels.device_caches[0][0].values())
    assert all(isinstance(form, triton.compiler.CompiledKernel) for form in forms)
    assert len({form.asm["cubin"] for form in forms}) == len(SIZES)


def test_a_key_is_compiled_once(kernels) -> None:
    ahead.compile_once("key", lambda: start(SIZES[:1]))
    ahead.compile_once("key", lambda: pytest.fail("it was there before"))
    ahead.compile_once("other", lambda: start(SIZES[:2]))
    assert compiled(kernels) == 2


def test_a_key_is_compiled_once_more_after_somebody_cancelled(kernels) -> None:
    def cancel() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ahead.compile_once("key", cancel)
    ahead.compile_once("key", lambda: start(SIZES[:1]))
    assert compiled(kernels) == 1


@pytest.mark.parametrize(("patience", "lines"), [(0.05, 2), (60.0, 0)])
def test_who_waits_is_told(
    kernels, patience: float, lines: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While it compiles, and how long it was; not where all kernels were there."""
    monkeypatch.setattr(ahead, "PATIENCE", patience)
    seen = []

    def compute() -> None:
        start(SIZES[:1])
        time.sleep(0.3)
        seen.extend(record.getMessage() for record in caplog.records)

    with caplog.at_level("INFO", ahead.log.name):
        ahead.compile_once("key", compute)
    assert len(caplog.records) == lines
    assert seen == ["SVDQ FLUX: compiling kernels for this GPU, which are kept for later"] * (lines // 2)
    if lines:
        assert re.search(r"compiling took \d+\.\d s", caplog.records[1].getMessage())


def test_other_threads_start_theirs(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    warm: dict[str, bool] = {}
    monkeypatch.setattr(ahead.JITFunction, "run", lambda self, *_, warmup, who, **__: warm.update({who: warmup}))

    def compute() -> None:
        other = threading.Thread(target=lambda: add_kernel[(1,)](who="other"))
        other.start()
        other.join()
        add_kernel[(1,)](who="this")

    ahead.compile_once("key", compute)
    assert warm == {"this": True, "other": False}


def test_a_parallel_compilation_of_others_stays_on(kernels) -> None:
    with ThreadPoolExecutor(1) as executor, parallel.AsyncCompileMode(executor) as others:
        ahead.compile_once("key", start)
        assert parallel.active_mode.get() is others


@pytest.mark.parametrize("fault", ["computation", "kernel"])
def test_a_fault_is_left_to_the_real_start(kernels, fault: str) -> None:
    def compute() -> None:
        start(SIZES[:1])
        if fault == "kernel":
            broken_kernel[(1,)](torch.zeros(4, dtype=torch.int32), 4)
        else:
            raise ValueError("in the computation")

    run = ahead.JITFunction.run
    ahead.compile_once("key", compute)
    assert ahead.JITFunction.run is run
    if fault == "computation" or "ignore_errors" in inspect.signature(parallel.AsyncCompileMode).parameters:
        assert compiled(kernels) == 1, "what is right is there"
    add_kernel.warmup(torch.zeros(128), torch.zeros(128), SIZES[1], grid=(1,))  # by itself again
    assert add_kernel.device_caches[0][0], "Triton compiles as before"
    with pytest.raises(triton.CompilationError):
        broken_kernel.warmup(torch.zeros(4, dtype=torch.int32), 4, grid=(1,))
