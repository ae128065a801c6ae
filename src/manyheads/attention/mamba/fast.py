"""The selective scan by chunks: one bulk exponential a chunk, a memory-lean backward.

B batch, H groups, N length, D state size, V channels a group, T tokens a chunk, n chunks.

Every state of every channel decays at its own rate, so there is no matrix product to hide the
recurrence in. What can be had: exponentials and products are made for a chunk at once in two
buffers that fit the processor's cache, the recurrence itself is one multiply-add a token on
them, channels are the innermost axis, and of the (B, N, H, D, V) states only one a chunk is kept.
The backward makes the states of a chunk again and walks it in reverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.layers.precision import without_autocast

__all__ = ["mamba_chunked"]


def mamba_chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    a: Tensor,
    memory: Tensor,
    *,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Return the outputs (B, H, N, V) and the final memory (B, H, V, D).

    Arguments as in `mamba_recurrence`, all of one dtype, float32 or float64.
    """
    out, final, _ = _forward_op(query, key, value, delta, a.mT, memory.mT, chunk_size)
    return out, final.mT


def _cut(t: Tensor, start: int, stop: int) -> Tensor:
    """Tokens start:stop of (B, H, N, ·) as (T, B, H, ·), channels innermost in memory too."""
    return t[:, :, start:stop].permute(2, 0, 1, 3).contiguous()


def _buffer(query: Tensor, a: Tensor, chunk_size: int) -> Tensor:
    batch, _, length, _ = query.shape
    return query.new_empty(min(chunk_size, length), batch, *a.shape)


def _states(
    steps: Tensor, key: Tensor, scaled: Tensor, a: Tensor, memory: Tensor, buffers: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the decays and the states of a chunk, (T, B, H, D, V), in the buffers.

    Args:
        steps: δ (T, B, H, V).
        key: (T, B, H, D).
        scaled: δx (T, B, H, V).
        a: (H, D, V).
        memory: (B, H, D, V) before the chunk.
        buffers: two of at least T tokens.
    """
    count = steps.shape[0]
    decay, states = (b[:count] for b in buffers[:2])
    torch.mul(steps[..., None, :], a, out=decay).exp_()
    torch.mul(key[..., None], scaled[..., None, :], out=states)
    for state, factor in zip(states.unbind(0), decay.unbind(0), strict=True):
        memory = state.addcmul_(factor, memory)
    return decay, states


@torch.library.custom_op("manyheads::mamba_chunked", mutates_args=())
@without_autocast
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    a: Tensor,
    memory: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    length = query.shape[2]
    out = torch.empty_like(value)  # laid out as its input, as the gradients are
    firsts = query.new_empty(-(-length // chunk_size), *memory.shape)
    memory, a = memory.contiguous(), a.contiguous()
    buffers = [_buffer(query, a, chunk_size) for _ in range(2)]
    for chunk, start in enumerate(range(0, length, chunk_size)):
        stop = min(start + chunk_size, length)
        firsts[chunk] = memory
        steps, k = _cut(delta, start, stop), _cut(key, start, stop)
        _, states = _states(steps, k, steps * _cut(value, start, stop), a, memory, buffers)
        y = (_cut(query, start, stop)[..., None, :] @ states).squeeze(-2)
        out[:, :, start:stop] = y.permute(1, 2, 0, 3)
        memory = states[-1].clone()
    # An operator returns no argument, and hands out memory in one layout.
    return out, memory.clone(), firsts


@_forward_op.register_fake
def _(query, key, value, delta, a, memory, chunk_size):  # type: ignore[no-untyped-def]
    chunks = -(-query.shape[2] // chunk_size)
    out = torch.empty_like(value)
    final = torch.empty_like(memory, memory_format=torch.contiguous_format)
    return out, final, query.new_empty(chunks, *memory.shape)


@torch.library.custom_op("manyheads::mamba_chunked_backward", mutates_args=())
@without_autocast
def _backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    a: Tensor,
    firsts: Tensor,
    grad_out: Tensor,
    grad_final: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Walk the chunks backwards with the gradient of the memory.

    With g_t the gradient of the states after token t, that of the logarithm of the decay is
    e_t = g_t · decay_t · S_{t-1}; δ gets its sum over D weighted by A, A over tokens weighted by δ.
    """
    length = query.shape[2]
    a = a.contiguous()
    inputs = (query, key, value, delta)
    grads = [torch.empty_like(t) for t in inputs]
    grad_a = a.new_zeros(firsts.shape[1:])
    buffers = [_buffer(query, a, chunk_size) for _ in range(3)]
    carried = grad_final.contiguous()  # gradient of the memory after the chunk
    for chunk in reversed(range(firsts.shape[0])):
        start = chunk * chunk_size
        stop = min(start + chunk_size, length)
        q, k, x, steps = (_cut(t, start, stop) for t in inputs)
        dy = _cut(grad_out, start, stop)
        scaled = steps * x
        decay, states = _states(steps, k, scaled, a, firsts[chunk], buffers)
        g = torch.mul(q[..., None], dy[..., None, :], out=buffers[2][: stop - start])
        rows, factors = g.unbind(0), decay.unbind(0)
        rows[-1].add_(carried)
        for t in range(stop - start - 1, 0, -1):
            rows[t - 1].addcmul_(factors[t], rows[t])
        dq = (dy[..., None, :] @ states.mT).squeeze(-2)
        dk = (scaled[..., None, :] @ g.mT).squeeze(-2)
        dscaled = (k[..., None, :] @ g).squeeze(-2)
        e = g.mul_(decay)
        carried = e[0].clone()
        e[1:].mul_(states[:-1])
        e[0].mul_(firsts[chunk])
        dsteps = torch.addcmul(torch.mul(e, a, out=decay).sum(-2), dscaled, x)
        grad_a += torch.mul(e, steps[..., None, :], out=states).sum(0)
        for whole, part in zip(grads, (dq, dk, dscaled * steps, dsteps), strict=True):
            whole[:, :, start:stop] = part.permute(1, 2, 0, 3)
    return grads[0], grads[1], grads[2], grads[3], grad_a.sum(0), carried.clone()


@_backward_op.register_fake
def _(query, key, value, delta, a, firsts, *rest):  # type: ignore[no-untyped-def]
    grads = (torch.empty_like(t) for t in (query, key, value, delta))
    return (*grads, a.new_empty(a.shape), firsts.new_empty(firsts.shape[1:]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, _, ctx.chunk_size = inputs
    firsts = output[2]
    ctx.mark_non_differentiable(firsts)
    ctx.save_for_backward(*tensors, firsts)


def _backward(ctx, grad_out, grad_final, _):  # type: ignore[no-untyped-def]
    grads = _backward_op(*ctx.saved_tensors, grad_out, grad_final, ctx.chunk_size)
    return (*grads, None)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
