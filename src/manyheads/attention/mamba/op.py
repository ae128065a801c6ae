"""The public functions: the selective scan on whole, padded, packed and continued sequences."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.mamba.definition import (
    MambaState,
    check_scan,
    mamba_recurrence,
    step_sizes,
)
from manyheads.attention.mamba.fast import mamba_scan
from manyheads.errors import unknown_name
from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.ragged import check_mask, map_packed
from manyheads.native import require

__all__ = ["CHUNK_SIZE", "mamba", "mamba_update"]

Implementation = Literal["auto", "native", "chunked", "recurrent"]
_IMPLEMENTATIONS = ("auto", "native", "chunked", "recurrent")
CHUNK_SIZE = 32


def mamba(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    a: Tensor,
    *,
    skip: Tensor | None = None,
    gate: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    implementation: Implementation = "auto",
) -> Tensor:
    """Mamba's selective scan, causal. Not softmax: needs training.

    In the paper's names query is C, key is B, value is x, skip is D and gate is z. A head is a
    group of V channels that share B and C; the published models have one group of all channels.

    Args:
        query: (B, H, N, D), what is read from the D states of each channel.
        key: (B, H_kv, N, D), how a token enters them; each key head serves H / H_kv
            consecutive query heads.
        value: (B, H_kv, N, V), one number for each token and channel.
        delta: (B, H_kv, N, V), the step of each token and channel.
        a: (H_kv, V, D), rates of decay, < 0: a state is multiplied by exp(delta · a).
        skip: (H_kv, V), adds skip · value to the output.
        gate: (B, H, N, V), multiplies the output by silu(gate).
        delta_bias: (H_kv, V), added to ``delta``.
        delta_softplus: pass ``delta`` (with its bias) through softplus; False: it is positive
            already.
        mask: (B, N), True = a real token; padded tokens neither decay nor enter the state, and
            their outputs are 0.
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1; each starts afresh.
        chunk_size: tokens a chunk; changes speed and memory, not the result.
        implementation: "chunked" (PyTorch, O(N) memory, its own backward), "native" (the same by
            compiled kernels, float32 on the CPU), "recurrent" (the definition), or "auto":
            native where it can be had, else chunked.

    Returns:
        (B, H, N, V) in the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit, or the implementation is unknown.
        RuntimeError: "native" is asked for and cannot be had.

    Example:
        >>> b = c = torch.randn(1, 1, 100, 16)
        >>> x = delta = torch.randn(1, 1, 100, 64)
        >>> mamba(c, b, x, delta, -torch.ones(1, 64, 16)).shape
        torch.Size([1, 1, 100, 64])
    """
    return mamba_update(
        None, query, key, value, delta, a,
        skip=skip, gate=gate, delta_bias=delta_bias, delta_softplus=delta_softplus,
        mask=mask, cu_seqlens=cu_seqlens, chunk_size=chunk_size, implementation=implementation,
    )[0]  # fmt: skip


def mamba_update(
    state: MambaState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    a: Tensor,
    *,
    skip: Tensor | None = None,
    gate: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    implementation: Implementation = "auto",
) -> tuple[Tensor, MambaState]:
    """Continue from a state with a block of tokens; arguments as :func:`mamba`.

    Args:
        state: what an earlier call returned, or None at the start; with ``cu_seqlens`` its batch
            is the number of sequences.

    Returns:
        The output (B, H, N, V) and the next state.
    """
    check_qkv(query, key, value, same_length=True)
    check_scan(key, value, delta, a)
    batch, heads, length, _ = query.shape
    mask = check_mask(mask, batch, length)
    _check_rest(query, value, skip, gate, delta_bias)
    if implementation not in _IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, _IMPLEMENTATIONS)
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1")
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("give mask or cu_seqlens, not both: packed tokens are all real")

        def run(q, k, v, d, z, memory, row_mask):  # type: ignore[no-untyped-def]
            own = None if memory is None else MambaState(memory)
            out, (final,) = mamba_update(
                own, q, k, v, d, a, skip=skip, gate=z, delta_bias=delta_bias,
                delta_softplus=delta_softplus, mask=row_mask, chunk_size=chunk_size,
                implementation=implementation,
            )  # fmt: skip
            return out, final

        memory = None if state is None else state.memory
        out, final = map_packed(
            run, (query, key, value, delta, gate), cu_seqlens, per_sequence=(memory,)
        )
        return out, MambaState(final)

    work = torch.promote_types(query.dtype, torch.float32)
    q, k, x, d, rates = (t.to(work) for t in (query, key, value, delta, a))
    skip, z, bias = (None if t is None else t.to(work) for t in (skip, gate, delta_bias))
    k, x, d = (repeat_kv(t, heads) for t in (k, x, d))
    rates = repeat_kv(rates[None], heads)[0]
    skip, bias = (None if t is None else repeat_kv(t[None], heads)[0] for t in (skip, bias))
    memory = q.new_zeros(batch, *rates.shape) if state is None else state.memory.to(work)
    if implementation == "native":
        require("scan", like=q)
    if length == 0:
        return torch.zeros_like(x, dtype=query.dtype), MambaState(memory)
    if implementation == "recurrent":
        out, memory = _recurrent(q, k, x, d, rates, memory, skip, z, bias, mask, delta_softplus)
    else:
        out, memory = mamba_scan(
            q, k, x, d, rates, memory, skip=skip, gate=z, bias=bias, mask=mask,
            softplus=delta_softplus, chunk_size=chunk_size,
            kernel=implementation != "chunked",
        )  # fmt: skip
    return out.to(query.dtype), MambaState(memory)


def _recurrent(
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
) -> tuple[Tensor, Tensor]:
    steps = step_sizes(delta, bias, softplus)
    if mask is not None:
        drop = ~mask[:, None, :, None]
        # A step of 0 leaves a state as it is; the others are cleared of what padding may hold.
        query, key, value, steps = (t.masked_fill(drop, 0) for t in (query, key, value, steps))
    out, memory = mamba_recurrence(query, key, value, steps, a, memory)
    if skip is not None:
        out = out + skip[:, None] * value
    if gate is not None:
        out = out * F.silu(gate)
    return (out if mask is None else out.masked_fill(drop, 0)), memory


def _check_rest(
    query: Tensor,
    value: Tensor,
    skip: Tensor | None,
    gate: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    channels = (value.shape[1], value.shape[3])
    for name, t in (("skip", skip), ("delta_bias", delta_bias)):
        if t is not None and t.shape != channels:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}, expected (groups, channels) = {channels}"
            )
    expected = (*query.shape[:3], value.shape[3])
    if gate is not None and gate.shape != expected:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}, expected that of the output "
            f"(batch, groups, length, channels) = {expected}"
        )
