"""Prefix attention by its definition, its states, and how they are merged and continued.

B batch, H heads, N length, D head dim of query and keys, V head dim of values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.layers.heads import repeat_kv
from manyheads.layers.precision import without_autocast
from manyheads.layers.ragged import check_mask
from manyheads.native import library

__all__ = [
    "AarenState",
    "aaren_reference",
    "aaren_step",
    "aaren_weights",
    "combine",
    "empty_state",
    "finite",
    "prefix_scores",
    "prefix_step",
]


class AarenState(NamedTuple):
    """What a set of tokens leaves behind, float32 at least.

    ``m`` (B, H) is the largest score s, ``u`` (B, H) the sum of e^(s − m) and ``w`` (B, H, V)
    that of e^(s − m) v. The empty set is (-inf, 0, 0).
    """

    m: Tensor
    u: Tensor
    w: Tensor

    @property
    def output(self) -> Tensor:
        """Return w / u, the attention over the set, (B, H, V); 0 for the empty set."""
        return self.w / torch.where(self.u > 0, self.u, 1)[..., None]


def combine(state_a: AarenState, state_b: AarenState) -> AarenState:
    """Merge what two disjoint sets of tokens left behind: associative and commutative.

    Merges shards of a context that were read apart, in any order. Leading axes may be any that
    broadcast. The merged ``m`` is a constant to autograd; ``w / u`` does not depend on it.
    """
    m = torch.maximum(state_a.m, state_b.m).detach()
    base = finite(m)
    a, b = (state_a.m - base).exp(), (state_b.m - base).exp()
    u = a * state_a.u + b * state_b.u
    return AarenState(m, u, a[..., None] * state_a.w + b[..., None] * state_b.w)


def empty_state(
    batch: int,
    heads: int,
    dim: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> AarenState:
    """Return the state of no tokens, the identity of :func:`combine`: (-inf, 0, 0)."""
    m = torch.full((batch, heads), -torch.inf, device=device, dtype=dtype)
    return AarenState(m, torch.zeros_like(m), m.new_zeros(batch, heads, dim))


def finite(m: Tensor) -> Tensor:
    """Return m with 0 for -inf, to be subtracted: the difference is never -inf − -inf."""
    return m.masked_fill(m == -torch.inf, 0)


@without_autocast
def prefix_scores(query: Tensor, key: Tensor, *, scale: float | None = None) -> Tensor:
    """Return scale · q·k_i for the one query of each head, (B, H, N).

    Args:
        query: (H, D), or (B, H, D).
        key: (B, H_kv, N, D).
        scale: D ** -0.5 unless given.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = query * scale
    if key.shape[1] == query.shape[-2]:
        batch = "" if query.ndim == 2 else "b"
        return torch.einsum(f"bhnd,{batch}hd->bhn", key, query)
    query = query.unflatten(-2, (key.shape[1], -1))
    return (key @ query.mT).transpose(-1, -2).flatten(1, 2)


def aaren_weights(
    query: Tensor, key: Tensor, *, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Return the implied attention matrix: row k is the softmax over tokens 1..k.

    Exact, O(N²): for looking at short sequences.

    Args:
        query: (H, D), or (B, H, D).
        key: (B, H_kv, N, D).
        scale: factor on the scores, D ** -0.5 unless given.
        mask: (B, N), True = a real token.

    Returns:
        (B, H, N, N), zero above the diagonal, at padded tokens and before the first real one.
    """
    scores = prefix_scores(query, key, scale=scale)
    batch, _, length = scores.shape
    allowed = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    mask = check_mask(mask, batch, length)
    if mask is not None:
        allowed = allowed & mask[:, None, None, :] & mask[:, None, :, None]
    weights = scores[..., None, :].masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return weights * allowed


def aaren_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention of the one query over every prefix, through N x N: the oracle of the tests.

    Arguments and result as :func:`aaren`.
    """
    if mask is not None:
        value = value.masked_fill(~mask[:, None, :, None], 0)
    weights = aaren_weights(query, key, scale=scale, mask=mask)
    return weights @ repeat_kv(value, query.shape[-2])


def prefix_step(state: AarenState, scores: Tensor, values: Tensor) -> tuple[Tensor, AarenState]:
    """Add one token whose score is known: scores (B, H), values (B, H, V).

    Returns:
        The output (B, H, V), in the dtype of ``values``, and the next state.
    """
    s, v = scores.to(state.m), values.to(state.w)
    run = _step if torch.is_grad_enabled() else _step_op  # the operator has no backward
    out, *after = run(s, v, *state)
    return out.to(values.dtype), AarenState(*after)


def _step(
    scores: Tensor, values: Tensor, m: Tensor, u: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state = combine(AarenState(m, u, w), AarenState(scores, torch.ones_like(u), values))
    return state.output, *state


@torch.library.custom_op("manyheads::aaren_step", mutates_args=())
@without_autocast
def _step_op(
    scores: Tensor, values: Tensor, m: Tensor, u: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lib = library("prefix", like=values)
    if lib is None:
        return _step(scores, values, m, u, w)
    out, after = values.new_empty(values.shape), [t.new_empty(t.shape) for t in (m, u, w)]
    inputs = (t.contiguous() for t in (scores, values, m, u, w))
    sizes = (m.numel(), 1, values.shape[2], torch.get_num_threads())
    lib("prefix_forward", *inputs, out, *after, sizes)
    return out, after[0], after[1], after[2]


@_step_op.register_fake
def _(scores, values, m, u, w):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (values, m, u, w))


def aaren_step(
    state: AarenState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, AarenState]:
    """Add one token in O(H (D + V)) time and constant memory.

    Args:
        state: the state so far; not changed.
        query: (H, D) or (B, H, D), the same at every step.
        key: (B, H_kv, D).
        value: (B, H_kv, V).
        scale: factor on the scores, D ** -0.5 unless given.

    Returns:
        The output (B, H, V) and the next state.
    """
    scores = prefix_scores(query.to(state.m), key[:, :, None].to(state.m), scale=scale)
    return prefix_step(state, scores.squeeze(-1), repeat_kv(value, query.shape[-2]))
