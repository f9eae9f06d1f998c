"""The Gluon names that differ between Triton 3.5 and 3.9, under one name each. Importing this file imports Triton.

Triton 3.7 renamed ``thread_barrier`` to ``barrier``, 3.8 ``async_copy_global_to_shared`` to ``async_load``; 3.9 has
``reinterpret`` of shared memory without an underscore. Everything else that kernels use (layouts, plain loads, split,
reshape, permute, inline assembly) has one name in all of them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def _has_reinterpret():
    return hasattr(gl.shared_memory_descriptor, "reinterpret")


@gluon.jit
def view_as(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """A shared memory buffer with another shape and layout."""
    if _has_reinterpret():
        return memory.reinterpret(dtype, shape, layout)
    else:
        return memory._reinterpret(dtype, shape, layout)


@gluon.jit
def store_as(memory, values, layout: gl.constexpr):
    """Store all of a shared memory buffer in another layout than its parts are read in."""
    view_as(memory, values.dtype, values.shape, layout).store(values)


__all__ = ["async_copy", "async_load", "barrier", "gl", "gluon", "store_as", "view_as"]
