"""One token against a memory of blocks, by the compiled kernel: nothing is gathered.

B batch, H heads, H_kv key heads, S stored blocks, k fetched blocks, L block with its landmark, D
and V head dims.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from manyheads.attention.landmark.memory import LandmarkMemory
from manyheads.layers.rotary import rotary_angles
from manyheads.native import library, require

__all__ = ["can_decode", "decode"]

_LANES = 16  # of a vector in csrc/vec.h
_PRODUCTS = 1 << 22  # a thread: below that, waking others costs more than they save


def can_decode(memory: LandmarkMemory, query: Tensor) -> bool:
    """Return whether the kernel can do it: one token, blocks in float32 in RAM or mapped files."""
    return (
        query.shape[2] == 1
        and query.numel() > 0
        and memory.stored > 0
        and all(t.dtype == torch.float32 and t.is_cpu for t in memory.held)
        and library("landmark", like=memory.held[0]) is not None
    )


def decode(memory: LandmarkMemory, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with one token, (B, H, 1, D), in float32; (B, H, 1, V). The memory is not changed."""
    tail = (None, None) if memory.tail is None or not memory.tail_length else memory.tail
    out: Tensor = _op(
        query[:, :, 0].contiguous(),
        key[:, :, 0].contiguous(),
        value[:, :, 0].contiguous(),
        *(None if t is None else t.contiguous() for t in tail),
        *memory.held,
        memory.stored,
        memory.seen,
        memory.top_k,
        memory.start,
        memory.positions == "exact",
        memory.selection == "max_over_heads",
        memory.rotary_theta,
        memory.rotary_interleaved,
    )
    return out[:, :, None]


@torch.library.custom_op("manyheads::landmark_decode", mutates_args=())
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tail_key: Tensor | None,
    tail_value: Tensor | None,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    lengths: Tensor,
    stored: int,
    seen: int,
    top_k: int,
    start: int,
    exact: bool,
    shared: bool,
    theta: float | None,
    interleaved: bool,
) -> Tensor:
    require("landmark", like=query)
    kernels = library("landmark")
    assert kernels is not None
    batch, heads, dim = query.shape
    size, value_dim = keys.shape[3], value.shape[2]
    tail = 0 if tail_key is None else tail_key.shape[2]
    count = min(top_k, stored)
    products = batch * heads * (stored * dim + (count + 1) * size * (dim + value_dim))
    threads = max(1, min(torch.get_num_threads(), products // _PRODUCTS))
    tables = (None, None, None) if theta is None else _tables(size, dim, theta, interleaved)
    width, value_width = (-(-n // _LANES) * _LANES for n in (dim, value_dim))
    parts = batch * heads * (count + 1)
    out = query.new_empty(batch, heads, value_dim)
    kernels(
        "landmark_decode",
        query, key, value, tail_key, tail_value, gates, lengths, keys, values, *tables,
        query.new_empty(batch * heads * stored),
        torch.empty(batch * heads * count, dtype=torch.int64),
        query.new_empty(parts * value_width),
        query.new_empty(parts),
        query.new_empty(threads * (2 * width + size)),
        out,
        (batch, heads, key.shape[1], dim, value_dim, size, stored, seen, top_k, tail, start,
         gates.shape[0], keys.shape[0], exact, interleaved, shared, threads),
        dim**-0.5,
    )  # fmt: skip
    return out


@_op.register_fake
def _(query, key, value, *_):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:2], value.shape[2])


@lru_cache(maxsize=16)
def _tables(size: int, dim: int, theta: float, interleaved: bool) -> tuple[Tensor, ...]:
    """Return the frequencies (D / 2), and the cosines and signed sines (L, D) of a block's places.

    A sine is positive at the first channel of a pair: what turns a query back by the place.
    """
    with torch.inference_mode(False):
        places = torch.arange(size)
        cos, sin = rotary_angles(places, dim, theta=theta)
        signs = (sin, -sin)
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if interleaved:
            pairs = (torch.stack(t, -1).flatten(1) for t in ((cos, cos), signs))
        else:
            pairs = (torch.cat(t, -1) for t in ((cos, cos), signs))
        return frequency, *(t.contiguous() for t in pairs)
