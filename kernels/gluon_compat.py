"""The Gluon names that differ between Triton 3.5 and 3.9, under one name each. Importing this file imports Triton.

Triton 3.7 renamed ``thread_barrier`` to ``barrier``, 3.8 ``async_copy_global_to_shared`` to ``async_load``. Everything
else that kernels use (layouts, plain loads, split, reshape, permute, inline assembly) has one name in all of them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

barrier = gl.constexpr(getattr(gl, "barrier", None) or gl.thread_barrier)
async_load = gl.constexpr(getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared)

__all__ = ["async_copy", "async_load", "barrier", "gl", "gluon"]
