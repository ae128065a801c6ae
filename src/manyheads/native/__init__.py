"""The CPU kernels of ``csrc/``: found, compiled on this machine at first use, cached and called.

A kernel is a plain C function over pointers and sizes. Each family is one file of ``csrc/`` and
one shared library; PyTorch forms do the same work wherever a library cannot be had.
"""

from manyheads.native.build import (
    BuildError,
    Family,
    build,
    cache_folder,
    describe,
    families,
)
from manyheads.native.int8 import int8_encode, int8_float_linear, int8_linear
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
    "BuildError",
    "Family",
    "Library",
    "build",
    "cache_folder",
    "describe",
    "disabled",
    "families",
    "int8_encode",
    "int8_float_linear",
    "int8_linear",
    "library",
    "pointer",
    "require",
    "status",
    "strided",
]
