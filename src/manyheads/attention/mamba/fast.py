"""The selective scan as one operator: kernels where they can be had, chunks in PyTorch elsewhere.

B batch, H groups, N length, D state size, V channels a group, n chunks, S slices of the channels.

Steps, skip and gate are part of the operator: what it saves for the backward are its inputs and
the states at the chunks' borders, and nothing else of the size of its inputs ever exists.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manyheads.attention.mamba.chunked import ScanInputs, scan_backward, scan_forward
from manyheads.layers.precision import without_autocast
from manyheads.native import Library, library, strided

__all__ = ["mamba_scan"]


def mamba_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    a: Tensor,
    memory: Tensor,
    *,
    skip: Tensor | None,
    gate: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    softplus: bool,
    chunk_size: int,
    kernel: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the outputs (B, H, N, V) and the final memory (B, H, V, D).

    Arguments as in `mamba`, all of one dtype, float32 or float64, and as many key heads as query
    heads; ``kernel`` False keeps to PyTorch.
    """
    out, final, _ = _forward_op(
        query, key, value, delta, a.mT, memory.mT, skip, gate, bias, mask, softplus, chunk_size,
        kernel, torch.is_grad_enabled(),
    )  # fmt: skip
    return out, final.mT


def _by_token(t: Tensor, last: int) -> Tensor:
    """An empty (B, H, N, ·) that lies in memory as (B, N, H, ·): merging its heads is free."""
    batch, heads, length, _ = t.shape
    return t.new_empty(batch, length, heads, last).transpose(1, 2)


def _rows(t: Tensor | None) -> Tensor | None:
    """``t``, its last axis contiguous."""
    if t is None or t.stride(-1) == 1 or t.shape[-1] == 1:
        return t
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _borders(query: Tensor, memory: Tensor, chunk_size: int, keep: bool) -> Tensor:
    """Room for the memory before each chunk, (n + 1, B, H, D, V); for none without ``keep``.

    It is one too many: whether there is one chunk or more is nothing a traced graph has to know.
    """
    chunks = -(-query.shape[2] // chunk_size)
    return query.new_empty(chunks + 1 if keep else 0, *memory.shape)


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(s for t in tensors for s in ((0, 0, 0) if t is None else t.stride()[:3]))


def _slices(batch: int, heads: int, channels: int) -> int:
    """How many parts the channels of one group are cut into, so that all threads have work."""
    threads = torch.get_num_threads()
    wanted = threads // math.gcd(max(batch * heads, 1), threads)
    return max(1, min(wanted, -(-channels // 16)))


def _kernel_inputs(
    x: ScanInputs, chunk_size: int
) -> tuple[list[Tensor | None], list[Tensor | None], tuple[int, ...]]:
    moving = [_rows(t) for t in (x.query, x.key, x.value, x.delta, x.gate)]
    fixed = [None if t is None else t.contiguous() for t in (x.a, x.skip, x.bias, x.mask)]
    batch, heads, length, states = x.query.shape
    channels = x.value.shape[3]
    sizes = (
        batch, heads, length, states, channels, min(chunk_size, length),
        _slices(batch, heads, channels), int(x.softplus), torch.get_num_threads(),
    )  # fmt: skip
    return moving, fixed, sizes


def _native_forward(
    lib: Library, x: ScanInputs, memory: Tensor, out: Tensor, borders: Tensor | None,
    chunk_size: int,
) -> Tensor:  # fmt: skip
    moving, fixed, sizes = _kernel_inputs(x, chunk_size)
    final = memory.clone(memory_format=torch.contiguous_format)
    scratch = memory.new_empty(sizes[8] * 32 * sizes[3])
    lib("scan_forward", *map(strided, moving), *fixed, final, borders, strided(out), scratch, sizes,
        _strides(*moving, out))  # fmt: skip
    return final


def _native_backward(
    lib: Library,
    x: ScanInputs,
    borders: Tensor,
    grad_out: Tensor,
    carried: Tensor,
    grads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    moving, fixed, sizes = _kernel_inputs(x, chunk_size)
    batch, heads, length, states = x.query.shape
    slices, threads = sizes[6], sizes[8]
    rows = _rows(grad_out)
    carry = carried.clone(memory_format=torch.contiguous_format)
    shared = [x.query.new_empty(slices, batch, length, heads, states).transpose(2, 3)
              for _ in range(2)] if slices > 1 else list(grads[:2])  # fmt: skip
    grad_a = torch.zeros_like(carry)
    grad_skip, grad_bias = (grad_a.new_zeros(batch, heads, sizes[4]) for _ in range(2))
    longest = min(chunk_size, length)
    own = 16 * (states * (4 * longest + 4) + 2 * longest)
    scratch = x.query.new_empty(threads * own)
    outputs = (*(t if slices == 1 else t[0] for t in shared), *grads[2:])
    lib("scan_backward", *map(strided, moving), *fixed, borders, strided(rows), carry,
        *map(strided, outputs), grad_a, grad_skip, grad_bias, scratch, sizes,
        _strides(*moving, rows, *outputs))  # fmt: skip
    if slices > 1:
        for whole, parts in zip(grads, shared, strict=False):
            assert whole is not None
            torch.sum(parts, 0, out=whole)
    return carry, grad_a, grad_skip, grad_bias


@torch.library.custom_op("manyheads::mamba_scan", mutates_args=())
@without_autocast
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    a: Tensor,
    memory: Tensor,
    skip: Tensor | None,
    gate: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    softplus: bool,
    chunk_size: int,
    kernel: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = ScanInputs(query, key, value, delta, a.contiguous(), skip, gate, bias, mask, softplus)
    out = _by_token(query, value.shape[3])
    borders = _borders(query, memory, chunk_size, keep)
    lib = library("scan", like=query) if kernel else None
    at = borders if keep else None
    if lib is None:
        final = scan_forward(x, memory.contiguous(), out, at, chunk_size)
    else:
        final = _native_forward(lib, x, memory, out, at, chunk_size)
    if keep:
        borders[-1] = 0
    return out, final, borders


@_forward_op.register_fake
def _(query, key, value, delta, a, memory, *rest):  # type: ignore[no-untyped-def]
    chunk_size, _, keep = rest[-3:]
    final = torch.empty_like(memory, memory_format=torch.contiguous_format)
    return _by_token(query, value.shape[3]), final, _borders(query, memory, chunk_size, keep)


@torch.library.custom_op("manyheads::mamba_scan_backward", mutates_args=())
@without_autocast
def _backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    a: Tensor,
    skip: Tensor | None,
    gate: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    borders: Tensor,
    grad_out: Tensor,
    grad_final: Tensor,
    softplus: bool,
    chunk_size: int,
    kernel: bool,
) -> list[Tensor]:
    """Return the gradients of query, key, value, delta, a, the first memory, and of those of
    skip, gate and bias that are there."""
    x = ScanInputs(query, key, value, delta, a.contiguous(), skip, gate, bias, mask, softplus)
    q, k, v, d = (_by_token(t, t.shape[3]) for t in (query, key, value, delta))
    z = None if gate is None else _by_token(gate, gate.shape[3])
    grads = (q, k, v, d, z)
    lib = library("scan", like=query) if kernel else None
    if lib is None:
        found = scan_backward(x, borders, grad_out, grad_final.contiguous(), grads, chunk_size)
    else:
        found = _native_backward(lib, x, borders, grad_out, grad_final, grads, chunk_size)
    first, grad_a, grad_skip, grad_bias = found
    optional = (
        None if skip is None else grad_skip.sum(0), z, None if bias is None else grad_bias.sum(0)
    )  # fmt: skip
    return [q, k, v, d, grad_a.sum(0), first, *(t for t in optional if t is not None)]


@_backward_op.register_fake
def _(query, key, value, delta, a, skip, gate, bias, mask, borders, *rest):  # type: ignore[no-untyped-def]
    found = [_by_token(t, t.shape[3]) for t in (query, key, value, delta)]
    found += [a.new_empty(a.shape), borders.new_empty(borders.shape[1:])]
    for t in (skip, gate, bias):
        if t is not None:
            found.append(_by_token(t, t.shape[3]) if t.ndim == 4 else t.new_empty(t.shape))
    return found


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, delta, a, _, skip, gate, bias, mask, *ctx.options, _ = inputs
    borders = output[2]
    ctx.mark_non_differentiable(borders)
    ctx.save_for_backward(query, key, value, delta, a, skip, gate, bias, mask, borders)


def _backward(ctx, grad_out, grad_final, _):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    q, k, v, d, a, first, *rest = _backward_op(*saved, grad_out, grad_final, *ctx.options)
    optional = [None if t is None else rest.pop(0) for t in saved[5:8]]
    return q, k, v, d, a, first, *optional, None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
