"""The public functions: flow attention on whole, padded, packed and continued sequences."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from manyheads.attention.flow.bidirectional import flow_bidirectional
from manyheads.attention.flow.causal import flow_causal
from manyheads.attention.flow.definition import FlowState, Kernel, feature_map, flow_reference
from manyheads.errors import unknown_name
from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.ragged import check_mask, map_packed

__all__ = ["empty_flow_state", "flow", "flow_update"]

Implementation = Literal["auto", "linear", "parallel"]
_IMPLEMENTATIONS = ("auto", "linear", "parallel")


def flow(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    kernel: Kernel = "sigmoid",
    eps: float = 1e-6,
    clamp: float | None = 1.0,
    outer_eps: float = 0.0,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    implementation: Implementation = "auto",
) -> Tensor:
    """Flow attention, causal or between all tokens. Linear time; not softmax: needs training.

    There is no ``scale``: the map squashes each number of a query and key by itself, and the
    flows are normalised, so a factor on the mapped queries would cancel.

    Args:
        query: (B, H, N, D), before the map.
        key: (B, H_kv, M, D), before the map; each key head serves H / H_kv consecutive query
            heads.
        value: (B, H_kv, M, V).
        is_causal: token t is normalised by tokens up to t, and its strength is settled there (the
            paper's approximation); needs N = M.
        kernel: "sigmoid", "relu" (relu(x) + 1e-6, of the Long Range Arena copy), or a function
            to non-negative numbers.
        eps: added to both factors of each flow's products.
        clamp: bound of the conserved source before its exponential, part of the result: 1 in the
            reference and vision code, 5 in the language, 10 in the decision model, None in the
            time series code.
        outer_eps: added to each flow as a whole; 1e-6 in the vision code.
        mask: (B, M), True = a real source. Padded sources give nothing, compete for nothing, and
            M is counted without them.
        query_mask: (B, N), True = a real sink; padded sinks take nothing and give 0. None: the
            sources' mask if N = M, else all are real. Pass it in cross-attention.
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1, for N = M.
        chunk_size: tokens a chunk in the causal form; changes speed, not the result.
        implementation: "linear" (O(N), the default), "parallel" (through the N x M matrix), or
            "auto".

    Returns:
        (B, H, N, V) in the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit (causal with N != M in particular), an unknown kernel or
            implementation, a negative eps, a clamp that is not positive.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 100, 16)
        >>> flow(q, k, v).shape
        torch.Size([1, 2, 100, 16])
    """
    check_qkv(query, key, value, same_length=is_causal)
    _check_options(eps, clamp, outer_eps, chunk_size)
    if implementation not in _IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, _IMPLEMENTATIONS)
    batch, heads, length, _ = query.shape
    mask = check_mask(mask, batch, key.shape[2])
    query_mask = check_mask(query_mask, batch, length)
    if is_causal and query_mask is not None:
        raise ValueError(
            "query_mask is for cross-attention: in the causal form query and key t are one token, "
            "give mask"
        )
    if cu_seqlens is not None:
        if mask is not None or query_mask is not None:
            raise ValueError("give mask or cu_seqlens, not both: packed tokens are all real")
        if length != key.shape[2]:
            raise ValueError(
                f"cu_seqlens needs one key for each query, got {length} and {key.shape[2]}: pad "
                "the sequences of a cross-attention and give mask and query_mask"
            )
        (out,) = map_packed(
            lambda q, k, v, m: flow(
                q, k, v, is_causal=is_causal, kernel=kernel, eps=eps, clamp=clamp,
                outer_eps=outer_eps, mask=m, chunk_size=chunk_size, implementation=implementation,
            ),
            (query, key, value),
            cu_seqlens,
        )  # fmt: skip
        return out
    if implementation == "parallel":
        out = flow_reference(
            query, key, value, is_causal=is_causal, kernel=kernel, eps=eps, clamp=clamp,
            outer_eps=outer_eps, mask=mask, query_mask=query_mask,
        )  # fmt: skip
    elif is_causal:
        out, _ = flow_update(
            None, query, key, value, kernel=kernel, eps=eps, clamp=clamp, outer_eps=outer_eps,
            mask=mask, chunk_size=chunk_size,
        )  # fmt: skip
    elif length == 0 or key.shape[2] == 0:
        out = query.new_zeros(batch, heads, length, value.shape[-1])
    else:
        if query_mask is None and length == key.shape[2]:
            query_mask = mask
        q, k, v, squash = _prepare(query, key, value, kernel)
        out = flow_bidirectional(
            q, k, v, query_mask, mask, squash=squash, eps=eps, clamp=clamp, outer_eps=outer_eps
        )
    return out.to(query.dtype)


def flow_update(
    state: FlowState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel: Kernel = "sigmoid",
    eps: float = 1e-6,
    clamp: float | None = 1.0,
    outer_eps: float = 0.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, FlowState]:
    """Continue the causal form from a state with a block of tokens; arguments as :func:`flow`.

    Args:
        state: what an earlier call returned, or None at the start; not changed. With
            ``cu_seqlens`` its batch is the number of sequences.

    Returns:
        The output (B, H, N, V) and the next state.
    """
    check_qkv(query, key, value, same_length=True)
    _check_options(eps, clamp, outer_eps, chunk_size)
    batch, heads, length, dim = query.shape
    mask = check_mask(mask, batch, length)
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("give mask or cu_seqlens, not both: packed tokens are all real")

        def run(q, k, v, *rest):  # type: ignore[no-untyped-def]
            *parts, row_mask = rest
            out, after = flow_update(
                None if state is None else FlowState(*parts), q, k, v, kernel=kernel, eps=eps,
                clamp=clamp, outer_eps=outer_eps, mask=row_mask, chunk_size=chunk_size,
            )  # fmt: skip
            return out, *after

        parts = () if state is None else tuple(state)
        out, *rest = map_packed(run, (query, key, value), cu_seqlens, per_sequence=parts)
        return out, FlowState(*rest)

    q, k, v, squash = _prepare(query, key, value, kernel)
    if state is None:
        sizes = (batch, heads, dim, v.shape[-1])
        state = empty_flow_state(*sizes, device=q.device, dtype=q.dtype)
    if length == 0:
        return query.new_zeros(batch, heads, 0, v.shape[-1]), state
    real = q.new_ones(batch, length, dtype=torch.long) if mask is None else mask.long()
    number = state.length[:, None] + real.cumsum(1)
    sums = (state.key_sum, state.key_flow, state.query_sum, state.query_flow)
    packed = torch.cat((state.memory, torch.stack(sums, -1)), -1).to(q)
    out, packed, competition = flow_causal(
        q, k, v, packed, state.competition.to(q), number.clamp_min(1).to(q), mask, squash=squash,
        eps=eps, clamp=clamp, outer_eps=outer_eps, chunk_size=min(chunk_size, length),
    )  # fmt: skip
    memory, flows = packed.split((v.shape[-1], 4), -1)
    key_sum, key_flow, query_sum, query_flow = flows.unbind(-1)
    after = FlowState(
        key_sum, query_sum, key_flow, query_flow, competition, memory, number[:, -1].clone()
    )
    return out.to(query.dtype), after


def empty_flow_state(
    batch: int,
    heads: int,
    dim: int,
    value_dim: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> FlowState:
    """Return the state before the first token; the log of an empty sum is the least number."""

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(batch, heads, *sizes, device=device, dtype=dtype)

    nothing = torch.full((batch, heads), torch.finfo(dtype).min, device=device, dtype=dtype)
    length = torch.zeros(batch, device=device, dtype=torch.long)
    sums = (zeros(dim), zeros(dim), zeros(dim), zeros(dim))
    return FlowState(*sums, nothing, zeros(dim, value_dim), length)


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, kernel: Kernel
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Return wide tensors with H heads, mapped, or to be squashed where they are needed."""
    work = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (repeat_kv(t.to(work), query.shape[1]) for t in (query, key, value))
    if kernel == "sigmoid":
        return q, k, v, True
    phi = feature_map(kernel)
    return phi(q), phi(k), v, False


def _check_options(eps: float, clamp: float | None, outer_eps: float, chunk_size: int) -> None:
    if eps < 0 or outer_eps < 0:
        raise ValueError(f"eps {eps} and outer_eps {outer_eps} must not be negative")
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp {clamp} must be positive, or None for no bound")
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1")
