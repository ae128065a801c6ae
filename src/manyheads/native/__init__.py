"""The CPU kernels of ``csrc/``: found, compiled on this machine at first use, cached and called.

A kernel is a plain C function over pointers and sizes. Each family is one file of ``csrc/`` and
one shared library; PyTorch forms do the same work wherever a library cannot be had.
"""

from manyheads.native.build import build, cache_folder, families
from manyheads.native.library import (
    Library,
    disabled,
    library,
    pointer,
    require,
    status,
    strided,
)

__all__ = [
    "Library",
    "build",
    "cache_folder",
    "disabled",
    "families",
    "library",
    "pointer",
    "require",
    "status",
    "strided",
]
