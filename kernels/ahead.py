"""Compile kernels side by side before they are needed: one after the other, a first FLUX step waits half a minute.

Triton compiles a kernel when it is first started. Here a computation runs once without starting any, which only tells
which kernels in which forms it needs; a few threads compile them meanwhile. Most of that is LLVM and ptxas, which let
other threads run. Uses a part of Triton that is not its public API, and does without where that is not there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from triton.runtime.jit import JITFunction

log = logging.getLogger(__name__)

THREADS = 6  # at most; each compilation takes 0.3 GB of RAM
PATIENCE = 2.0  # seconds; kernels that are in Triton's cache take less
_seen: set[Hashable] = set()
_patching = threading.Lock()


def compile_once(key: Hashable, compute: Callable[[], object]) -> None:
    """Compile all kernels that ``compute`` starts, unless it was done for this ``key``; never raises for them. Where
    that takes longer than PATIENCE, the log says why nothing moves.

    compute: must not mind that none of its kernels has run, and change nothing besides.
    """
    if key in _seen:
        return
    _seen.add(key)
    try:
        from triton.runtime._async_compile import AsyncCompileMode, active_mode
    except ImportError:  # they are compiled one by one
        return
    start, threads, before = time.perf_counter(), min(THREADS, os.cpu_count() or 1), active_mode.get()
    said = threading.Timer(PATIENCE, log.info, ["SVDQ FLUX: compiling kernels for this GPU, which are kept for later"])
    said.daemon = True
    said.start()
    try:
        with _patching, ThreadPoolExecutor(threads) as executor:
            try:
                compiling = AsyncCompileMode(executor, ignore_errors=True)
            except TypeError:  # Triton 3.5
                compiling = AsyncCompileMode(executor)
            with compiling, _nothing_starts():
                compute()
    except Exception as error:  # comes again where kernels start, and is named there
        log.debug("compiling ahead failed: %s", error)
        return
    except BaseException:  # somebody cancels
        _seen.discard(key)
        raise
    finally:
        said.cancel()
        active_mode.set(before)  # which Triton 3.5 leaves to itself only where nothing fails
    took = time.perf_counter() - start
    level = logging.INFO if took > PATIENCE else logging.DEBUG
    log.log(level, "SVDQ FLUX: compiling took %.1f s, %d threads", took, threads)


def name_functions(package: str) -> None:
    """Have Triton name the functions of kernels in all modules of ``package`` that are imported.

    Kernels are in its cache under these names. That of a function takes in constants of the functions that it calls,
    if those have names by then. So they come first here, and which kernel a process starts first does not matter.
    """
    known: set[int] = set()

    def name(function: Any) -> None:
        if id(function) in known:
            return
        known.add(id(function))
        for word in function.fn.__code__.co_names:
            called = function.fn.__globals__.get(word)
            if hasattr(type(called), "cache_key"):
                name(called)
        _ = function.cache_key

    for module in [module for key, module in sys.modules.items() if key.startswith(f"{package}.")]:
        for function in vars(module).values():
            if isinstance(function, JITFunction):
                name(function)


@contextlib.contextmanager
def _nothing_starts() -> Iterator[None]:
    """Kernels of this thread are compiled and not started."""
    run, here = JITFunction.run, threading.get_ident()

    def compile_only(self, *args, grid, warmup, **options):
        return run(self, *args, grid=grid, warmup=warmup or threading.get_ident() == here, **options)

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run
