"""The selective scan by chunks in PyTorch: one bulk exponential a chunk, a memory-lean backward.

B batch, H groups, N length, D state size, V channels a group, T tokens a chunk, n chunks.

Every state of every channel decays at its own rate, so there is no matrix product to hide the
recurrence in. What can be had: exponentials and products are made for a chunk at once in two
buffers that fit the processor's cache, the recurrence itself is one multiply-add a token on
them, channels are the innermost axis, and of the (B, N, H, D, V) states only one a chunk is kept.
The backward makes the states of a chunk again and walks it in reverse.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.mamba.definition import step_sizes

__all__ = ["ScanInputs", "scan_backward", "scan_forward"]


class ScanInputs(NamedTuple):
    """What a scan reads: ``query``, ``key`` (B, H, N, D); ``value``, ``delta`` (B, H, N, V);
    ``a`` (H, D, V); ``skip``, ``bias`` (H, V); ``gate`` (B, H, N, V); ``mask`` (B, N)."""

    query: Tensor
    key: Tensor
    value: Tensor
    delta: Tensor
    a: Tensor
    skip: Tensor | None
    gate: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    softplus: bool


class _Chunk(NamedTuple):
    """The tokens of a chunk, (T, B, H, ·), cleared of padding: a step of 0 changes no state."""

    query: Tensor
    key: Tensor
    value: Tensor
    raw: Tensor  # the steps before bias and softplus
    steps: Tensor
    gate: Tensor | None
    drop: Tensor | None  # (T, B, 1, 1), True = padding

    def clear(self, t: Tensor) -> Tensor:
        return t if self.drop is None else t.masked_fill(self.drop, 0)


def _chunk(x: ScanInputs, start: int, stop: int) -> _Chunk:
    drop = None if x.mask is None else ~x.mask[:, start:stop].mT[..., None, None]

    def cut(t: Tensor) -> Tensor:
        t = t[:, :, start:stop].permute(2, 0, 1, 3)
        return t.contiguous() if drop is None else t.masked_fill(drop, 0).contiguous()

    raw = cut(x.delta)
    steps = step_sizes(raw.unsqueeze(-2), x.bias, x.softplus).squeeze(-2)
    if drop is not None:
        steps = steps.masked_fill(drop, 0)
    gate = None if x.gate is None else cut(x.gate)
    return _Chunk(cut(x.query), cut(x.key), cut(x.value), raw, steps, gate, drop)


def _states(c: _Chunk, a: Tensor, memory: Tensor, buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the decays and the states of a chunk, (T, B, H, D, V), in the first two buffers.

    Args:
        c: the chunk.
        a: (H, D, V).
        memory: (B, H, D, V) before the chunk.
        buffers: of at least T tokens.
    """
    decay, states = (b[: len(c.steps)] for b in buffers[:2])
    torch.mul(c.steps[..., None, :], a, out=decay).exp_()
    torch.mul(c.key[..., None], (c.steps * c.value)[..., None, :], out=states)
    for state, factor in zip(states.unbind(0), decay.unbind(0), strict=True):
        memory = state.addcmul_(factor, memory)
    return decay, states


def _buffers(x: ScanInputs, chunk_size: int, count: int) -> list[Tensor]:
    batch, _, length, _ = x.query.shape
    size = (min(chunk_size, length), batch, *x.a.shape)
    return [x.query.new_empty(size) for _ in range(count)]


def _read(c: _Chunk, states: Tensor, skip: Tensor | None) -> Tensor:
    y = (c.query[..., None, :] @ states).squeeze(-2)
    return y if skip is None else y.addcmul_(skip, c.value)


def scan_forward(
    x: ScanInputs, memory: Tensor, out: Tensor, borders: Tensor | None, chunk_size: int
) -> Tensor:
    """Write the outputs to ``out`` (B, H, N, V) and the memory before each chunk to ``borders``
    (n, B, H, D, V); return the last memory (B, H, D, V)."""
    length = x.query.shape[2]
    buffers = _buffers(x, chunk_size, 2)
    for index, start in enumerate(range(0, length, chunk_size)):
        stop = min(start + chunk_size, length)
        if borders is not None:
            borders[index] = memory
        c = _chunk(x, start, stop)
        _, states = _states(c, x.a, memory, buffers)
        y = _read(c, states, x.skip)
        if c.gate is not None:
            y = y.mul_(F.silu(c.gate))
        out[:, :, start:stop] = y.permute(1, 2, 0, 3)
        memory = states[-1].clone()
    return memory


def scan_backward(
    x: ScanInputs,
    borders: Tensor,
    grad_out: Tensor,
    carried: Tensor,
    grads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Walk the chunks backwards with the gradient of the memory.

    With g_t the gradient of the states after token t, that of the logarithm of the decay is
    e_t = g_t · decay_t · S_{t-1}; δ gets its sum over D weighted by A, A over tokens weighted by δ.

    Args:
        x: inputs of the forward.
        borders: (n, B, H, D, V), or more.
        grad_out: (B, H, N, V).
        carried: the gradient of the last memory, (B, H, D, V).
        grads: written to: those of query, key, value, delta and gate.
        chunk_size: that of the forward.

    Returns:
        The gradients of the first memory, of a (B, H, D, V), of skip and of bias (B, H, V).
    """
    length = x.query.shape[2]
    grad_a = torch.zeros_like(borders[0])
    grad_skip, grad_bias = (grad_a.new_zeros(grad_out[:, :, 0].shape) for _ in range(2))
    buffers = _buffers(x, chunk_size, 3)
    for start in reversed(range(0, length, chunk_size)):
        first = borders[start // chunk_size]
        stop = min(start + chunk_size, length)
        c = _chunk(x, start, stop)
        q, k, v, steps = c.query, c.key, c.value, c.steps
        dy = grad_out[:, :, start:stop].permute(2, 0, 1, 3).contiguous()
        decay, states = _states(c, x.a, first, buffers)
        dgate = None
        if c.gate is not None:
            opened = c.gate.sigmoid()
            slope = opened * (1 + c.gate * (1 - opened))
            dgate = dy * _read(c, states, x.skip) * slope
            dy = dy * (c.gate * opened)
        g = torch.mul(q[..., None], dy[..., None, :], out=buffers[2][: stop - start])
        rows, factors = g.unbind(0), decay.unbind(0)
        rows[-1].add_(carried)
        for t in range(stop - start - 1, 0, -1):
            rows[t - 1].addcmul_(factors[t], rows[t])
        dq = (dy[..., None, :] @ states.mT).squeeze(-2)
        dk = ((steps * v)[..., None, :] @ g.mT).squeeze(-2)
        dscaled = (k[..., None, :] @ g).squeeze(-2)
        e = g.mul_(decay)
        carried = e[0].clone()
        e[1:].mul_(states[:-1])
        e[0].mul_(first)
        draw = torch.addcmul(torch.mul(e, x.a, out=decay).sum(-2), dscaled, v)
        grad_a += torch.mul(e, steps[..., None, :], out=states).sum(0)
        if x.softplus:
            bias = 0 if x.bias is None else x.bias
            draw = draw * (c.raw + bias).sigmoid()
        draw = c.clear(draw)
        dv = dscaled * steps
        if x.skip is not None:
            dv = dv.addcmul_(dy, x.skip)
            grad_skip += (dy * v).sum(0)
        grad_bias += draw.sum(0)
        parts = (c.clear(dq), dk, c.clear(dv), draw, dgate)
        for whole, part in zip(grads, parts, strict=True):
            if whole is not None and part is not None:
                whole[:, :, start:stop] = c.clear(part).permute(1, 2, 0, 3)
    return carried, grad_a, grad_skip, grad_bias
