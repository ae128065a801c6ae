"""NormAttention on whole, padded, packed and continued sequences.

B batch, H heads, N length, D head dim of queries and keys, V head dim of values.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from manyheads.attention.norm.definition import NormState, norm_reference, norm_step
from manyheads.attention.norm.fast import fused_norm_over_heads, normed_product
from manyheads.errors import unknown_name
from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.linear import causal_linear
from manyheads.layers.ragged import check_mask, map_packed
from manyheads.layers.recurrent import has_short_scan, short_scan

__all__ = ["norm", "norm_update"]

Implementation = Literal["auto", "chunked", "parallel", "recurrent"]
_IMPLEMENTATIONS = ("auto", "chunked", "parallel", "recurrent")


def norm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-8,
    normalize: bool = True,
    chunk_size: int = 64,
    implementation: Implementation = "auto",
) -> Tensor:
    """NormAttention: linear attention without a denominator, then a norm over all heads. O(N).

    Not softmax: needs training. Queries and keys have been through their feature map already.

    Args:
        query: (B, H, N, D).
        key: (B, H_kv, N, D); each key head serves H / H_kv consecutive query heads.
        value: (B, H_kv, N, V).
        is_causal: token i sees tokens up to i.
        scale: factor on the products, 1 unless given; without effect but through ``eps``.
        mask: (B, N), True = a real token; padded tokens are not summed, and their outputs are 0.
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1; each starts afresh.
        eps: added to the root mean square of a token's output. The gradient is bounded by a
            multiple of 1 / eps, which at 1e-8 is no bound in practice.
        normalize: False returns the plain sums, to be normalised by the caller; they grow with N.
        chunk_size: tokens a chunk of the causal form; changes speed, not the result.
        implementation: "chunked" (linear in N, closed-form backward), "parallel" (through the
            N x N matrix, under autograd), "recurrent" (token by token, causal only), or "auto".

    Returns:
        (B, H, N, V) in the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit, or the implementation is unknown or not causal.

    Example:
        >>> q = k = v = torch.randn(1, 2, 100, 16)
        >>> norm(q, k, v).shape
        torch.Size([1, 2, 100, 16])
    """
    check_qkv(query, key, value, same_length=True)
    mask = check_mask(mask, query.shape[0], query.shape[2])
    if implementation not in _IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, _IMPLEMENTATIONS)
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("give mask or cu_seqlens, not both: packed tokens are all real")
        (out,) = map_packed(
            lambda q, k, v, m: norm(
                q, k, v, is_causal=is_causal, scale=scale, mask=m, eps=eps, normalize=normalize,
                chunk_size=chunk_size, implementation=implementation,
            ),
            (query, key, value),
            cu_seqlens,
        )  # fmt: skip
        return out
    if is_causal:
        return norm_update(
            None,
            query,
            key,
            value,
            scale=scale,
            mask=mask,
            eps=eps,
            normalize=normalize,
            chunk_size=chunk_size,
            implementation=implementation,
        )[0]
    if implementation == "recurrent":
        raise ValueError("implementation='recurrent' reads in one direction: pass is_causal=True")
    q, k, v = _prepared(query, key, value, mask, scale)
    with torch.autocast(q.device.type, enabled=False):
        if implementation == "parallel":
            out = norm_reference(q, k, v, eps=eps, normalize=normalize)
        else:
            memory = repeat_kv(k.mT @ v, q.shape[1])
            out = normed_product(q, memory, eps=eps) if normalize else q @ memory
    return _finished(out, query, mask)


def norm_update(
    state: NormState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    normalize: bool = True,
    chunk_size: int = 64,
    implementation: Implementation = "auto",
) -> tuple[Tensor, NormState]:
    """Continue causally from a state with a block of tokens; arguments as :func:`norm`.

    Args:
        state: what an earlier call returned, or None at the start; not changed.

    Returns:
        The output (B, H, N, V) and the next state.
    """
    check_qkv(query, key, value, same_length=True)
    batch, heads, length, dim = query.shape
    mask = check_mask(mask, batch, length)
    if implementation not in _IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, _IMPLEMENTATIONS)
    q, k, v = _prepared(query, key, value, mask, scale)
    group = heads // k.shape[1]
    if state is None:
        memory = q.new_zeros(batch, k.shape[1], dim, v.shape[-1])
    else:
        memory = state.memory.to(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        if implementation == "auto" and group == 1 and has_short_scan(q, k, v, memory):
            out, memory = short_scan(q, k, v, None, memory)
        elif implementation == "recurrent":
            out, memory = _recurrent(q, k, v, memory)
        elif implementation == "parallel":
            out = norm_reference(q, k, v, is_causal=True, normalize=False)
            out = out + q @ repeat_kv(memory, heads)
            memory = memory + k.mT @ v
        else:
            out, final = causal_linear(
                q,
                repeat_kv(k, heads),
                repeat_kv(v, heads),
                repeat_kv(memory, heads),
                chunk_size=chunk_size,
            )
            memory = final if group == 1 else final[:, ::group]
        if normalize:
            out = fused_norm_over_heads(out, eps=eps)
    return _finished(out, query, mask), NormState(memory)


def _prepared(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Widen, scale, and zero what is padding."""
    work = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (t.to(work) for t in (query, key, value))
    if scale is not None:
        q = q * scale
    if mask is not None:
        drop = ~mask[:, None, :, None]
        q, k, v = (t.masked_fill(drop, 0) for t in (q, k, v))
    return q, k, v


def _finished(out: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        out = out.masked_fill(~mask[:, None, :, None], 0)
    return out.to(query.dtype)


def _recurrent(q: Tensor, k: Tensor, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    outputs, state = [q.new_zeros(*q.shape[:2], 0, v.shape[-1])], NormState(memory)
    for t in range(q.shape[2]):
        out, state = norm_step(state, q[:, :, t], k[:, :, t], v[:, :, t], normalize=False)
        outputs.append(out[:, :, None])
    return torch.cat(outputs, 2), state.memory
