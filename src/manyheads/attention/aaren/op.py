"""The public functions: prefix attention on whole, padded, packed and continued sequences.

B batch, H heads, N length, D head dim of query and keys, V head dim of values.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.aaren.definition import (
    AarenState,
    combine,
    empty_state,
    finite,
    prefix_scores,
    prefix_step,
)
from manyheads.attention.aaren.fast import prefix_softmax
from manyheads.errors import unknown_name
from manyheads.layers.heads import repeat_kv
from manyheads.layers.precision import without_autocast
from manyheads.layers.ragged import check_mask, map_packed
from manyheads.native import require

__all__ = ["aaren", "aaren_update", "many_to_one", "prefix_attention", "prefix_states"]

Implementation = Literal["auto", "native", "chunked", "recurrent", "scan"]
_IMPLEMENTATIONS = ("auto", "native", "chunked", "recurrent", "scan")
CHUNK = 32


def aaren(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK,
    implementation: Implementation = "auto",
) -> Tensor:
    """Softmax attention of one fixed query over every prefix of the tokens; causal.

    Exact: row k equals softmax attention of ``query`` over tokens 1..k.

    Args:
        query: (H, D), or (B, H, D): one query a head, for all tokens.
        key: (B, H_kv, N, D); each key head serves H / H_kv consecutive query heads.
        value: (B, H_kv, N, V).
        scale: factor on the scores, D ** -0.5 unless given.
        mask: (B, N), True = a real token; padded tokens are as if absent, their outputs are 0.
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1; each starts afresh.
        chunk_size: tokens a chunk; changes speed, not the result.
        implementation: see :func:`prefix_attention`.

    Returns:
        (B, H, N, V) in the dtype of ``value``.

    Raises:
        ValueError: shapes do not fit, or the implementation is unknown.

    Example:
        >>> k = v = torch.randn(1, 2, 100, 16)
        >>> aaren(torch.randn(2, 16), k, v).shape
        torch.Size([1, 2, 100, 16])
    """
    return aaren_update(
        None,
        query,
        key,
        value,
        scale=scale,
        mask=mask,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        implementation=implementation,
    )[0]


def aaren_update(
    state: AarenState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK,
    implementation: Implementation = "auto",
) -> tuple[Tensor, AarenState]:
    """Continue from a state with a block of tokens; arguments as :func:`aaren`.

    Args:
        state: what an earlier call returned, or None at the start; with ``cu_seqlens`` its batch
            is the number of sequences.

    Returns:
        The output (B, H, N, V) and the next state.
    """
    _check_query(query, key, value)
    wide = torch.promote_types(key.dtype, torch.float32)
    scores = prefix_scores(query.to(wide), key.to(wide), scale=scale)
    out, state = prefix_attention(
        scores,
        value,
        state=state,
        mask=mask,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    if mask is not None:
        out = out.masked_fill(~mask.bool()[:, None, :, None], 0)
    return out, state


def prefix_attention(
    scores: Tensor,
    values: Tensor,
    *,
    state: AarenState | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK,
    implementation: Implementation = "auto",
) -> tuple[Tensor, AarenState]:
    """Average the values of every prefix with the softmax of its scores, and return the state.

    Args:
        scores: (B, H, N), of any finite size, or -inf for a token that is not there.
        values: (B, H_kv, N, V), finite at real tokens.
        state: what an earlier call returned, or None at the start; with ``cu_seqlens`` its batch
            is the number of sequences.
        mask: (B, N), True = a real token. A padded token leaves the state as it is, and its
            output is what the state gives: that of the last real token, 0 before the first.
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1; each starts afresh.
        chunk_size: tokens a chunk; changes speed, not the result.
        implementation: "native" (compiled kernels, float32 on the CPU), "chunked" (matrix products,
            O(N (C + V))), "recurrent" (token by token), "scan" (the paper's Hillis-Steele scan,
            O(N V log N)), or "auto": native where it can be had, else chunked. Only recurrent and
            scan can be differentiated twice.

    Returns:
        The outputs (B, H, N, V) in the dtype of ``values``, and the state after the last token.

    Raises:
        ValueError: shapes do not fit, or the implementation is unknown.
        RuntimeError: "native" is asked for and cannot be had.
    """
    batch, _, length = _check_scores(scores, values)
    mask = check_mask(mask, batch, length)
    if implementation not in _IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, _IMPLEMENTATIONS)
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1")
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("give mask or cu_seqlens, not both: packed tokens are all real")

        def run(s, v, m, u, w, row_mask):  # type: ignore[no-untyped-def]
            own = None if m is None else AarenState(m, u, w)
            out, after = prefix_attention(
                s, v, state=own, mask=row_mask, chunk_size=chunk_size,
                implementation=implementation,
            )  # fmt: skip
            return out, *after

        parts = (None, None, None) if state is None else state
        out, *after = map_packed(run, (scores, values), cu_seqlens, per_sequence=parts)
        return out, AarenState(*after)

    s, v, state = _prepare(scores, values, state, mask)
    if implementation == "native":
        require("prefix", like=v)
    if length == 0:
        out = torch.zeros_like(v)
    elif implementation == "recurrent":
        out, state = _recurrent(s, v, state)
    elif implementation == "scan":
        states = _scan(s, v, state)
        last = (states.m[..., -1], states.u[..., -1], states.w[:, :, -1])
        out, state = states.output, AarenState(*(t.clone() for t in last))
    else:
        kernel = implementation != "chunked"
        out, m, u, w = prefix_softmax(s, v, *state, chunk_size=chunk_size, kernel=kernel)
        state = AarenState(m[..., -1].clone(), u[..., -1].clone(), w)
    return out.to(values.dtype), state


def prefix_states(
    scores: Tensor,
    values: Tensor,
    *,
    state: AarenState | None = None,
    mask: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> AarenState:
    """Return the state after every token: m and u (B, H, N), w (B, H, N, V).

    Arguments as :func:`prefix_attention`. Needs the memory of one more output.
    """
    batch, _, length = _check_scores(scores, values)
    s, v, state = _prepare(scores, values, state, check_mask(mask, batch, length))
    if length == 0:
        return AarenState(s, torch.zeros_like(s), torch.zeros_like(v))
    out, m, u, _ = prefix_softmax(s, v, *state, chunk_size=chunk_size)
    return AarenState(m, u, u[..., None] * out)


def many_to_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    state: AarenState | None = None,
    block_size: int = 1024,
) -> tuple[Tensor, AarenState]:
    """Attention of one query over all tokens, a block at a time: O(block_size) extra memory.

    Args:
        query: (H, D), or (B, H, D).
        key: (B, H_kv, N, D).
        value: (B, H_kv, N, V).
        scale: factor on the scores, D ** -0.5 unless given.
        mask: (B, N), True = a real token.
        state: tokens read before, or None.
        block_size: tokens read at once; changes memory and speed, not the result.

    Returns:
        The output (B, H, V) in the dtype of ``value``, and the state of all tokens read.

    Raises:
        ValueError: shapes do not fit, or a block without tokens.
    """
    _check_query(query, key, value)
    if block_size < 1:
        raise ValueError(f"block_size {block_size} must be at least 1")
    batch, _, length, _ = key.shape
    mask = check_mask(mask, batch, length)
    wide = torch.promote_types(key.dtype, torch.float32)
    for start in range(0, max(length, 1), block_size):
        block = slice(start, start + block_size)
        scores = prefix_scores(query.to(wide), key[:, :, block].to(wide), scale=scale)
        here = None if mask is None else mask[:, block]
        s, v, state = _prepare(scores, value[:, :, block], state, here)
        if s.shape[-1]:
            state = combine(state, _summarise(s, v))
    assert state is not None
    return state.output.to(value.dtype), state


@without_autocast
def _summarise(s: Tensor, v: Tensor) -> AarenState:
    """Return what a block leaves behind, through one row of weights."""
    m = s.amax(-1).detach()
    p = (s - finite(m)[..., None]).exp()
    return AarenState(m, p.sum(-1), (p[..., None, :] @ v).squeeze(-2))


def _prepare(
    scores: Tensor, values: Tensor, state: AarenState | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, AarenState]:
    """Return float32 or float64 scores and values without the padding, and a state."""
    wide = torch.promote_types(torch.promote_types(scores.dtype, values.dtype), torch.float32)
    s, v = scores.to(wide), repeat_kv(values.to(wide), scores.shape[1])
    if mask is not None:
        s = s.masked_fill(~mask[:, None], -torch.inf)
        v = v.masked_fill(~mask[:, None, :, None], 0)
    if state is None:
        return s, v, empty_state(s.shape[0], s.shape[1], v.shape[-1], device=s.device, dtype=wide)
    return s, v, AarenState(*(t.to(wide) for t in state))


def _recurrent(s: Tensor, v: Tensor, state: AarenState) -> tuple[Tensor, AarenState]:
    outputs = []
    for t in range(s.shape[-1]):
        out, state = prefix_step(state, s[..., t], v[:, :, t])
        outputs.append(out)
    return torch.stack(outputs, 2), state


def _scan(s: Tensor, v: Tensor, state: AarenState) -> AarenState:
    """In round r combine each place with the one 2^r before it."""
    states = AarenState(s, torch.ones_like(s), v)
    reach = 1
    while reach < s.shape[-1]:
        before = _shift(states, reach)
        states, reach = combine(before, states), 2 * reach
    return combine(AarenState(state.m[..., None], state.u[..., None], state.w[:, :, None]), states)


def _shift(states: AarenState, places: int) -> AarenState:
    m, u = (
        F.pad(t[..., :-places], (places, 0), value=fill)
        for t, fill in ((states.m, -torch.inf), (states.u, 0.0))
    )
    return AarenState(m, u, F.pad(states.w[:, :, :-places], (0, 0, places, 0)))


def _check_query(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.ndim not in (2, 3):
        raise ValueError(
            f"query has {query.ndim} axes, expected (heads, head_dim) or (batch, heads, head_dim): "
            "Aaren has one query a head for all tokens"
        )
    if key.ndim != 4:
        raise ValueError(f"key has {key.ndim} axes, expected (batch, heads, length, head_dim)")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"head_dim of query and key differ: {query.shape[-1]} and {key.shape[-1]}")
    if query.ndim == 3 and query.shape[0] != key.shape[0]:
        raise ValueError(f"batch of query and key differ: {query.shape[0]} and {key.shape[0]}")
    if query.shape[-2] % key.shape[1]:
        raise ValueError(
            f"{query.shape[-2]} query heads are not a multiple of {key.shape[1]} key-value heads"
        )
    _compare(key, value, "key")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"heads of key and value differ: {key.shape[1]} and {value.shape[1]}")


def _check_scores(scores: Tensor, values: Tensor) -> tuple[int, int, int]:
    if scores.ndim != 3:
        raise ValueError(f"scores have {scores.ndim} axes, expected (batch, heads, length)")
    _compare(scores, values, "scores")
    batch, heads, length = scores.shape
    if heads % values.shape[1]:
        raise ValueError(
            f"{heads} heads of scores are not a multiple of the {values.shape[1]} heads of values"
        )
    return batch, heads, length


def _compare(tensor: Tensor, values: Tensor, name: str) -> None:
    if values.ndim != 4:
        raise ValueError(f"value has {values.ndim} axes, expected (batch, heads, length, head_dim)")
    for axis, place in (("batch", 0), ("length", 2)):
        if tensor.shape[place] != values.shape[place]:
            raise ValueError(
                f"{axis} of {name} and value differ: {tensor.shape[place]} and "
                f"{values.shape[place]}"
            )
