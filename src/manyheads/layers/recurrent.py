"""Linear recurrences of matrix states over few tokens: S <- e^g S + k vᵀ, o = q S. No gradient.

B batch, H heads, N tokens, D keys, V values. A kernel (``csrc/recurrent.cpp``) where one can be
had: it reads and writes a state once for all tokens. Long sequences are matrix products elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.layers.precision import without_autocast
from manyheads.native import library

__all__ = ["SHORT", "has_short_scan", "short_scan"]

SHORT = 64  # tokens at most: one chunk of what products over chunks would do


def has_short_scan(*inputs: Tensor) -> bool:
    """Whether :func:`short_scan` is the fast way for these (B, H, N, ·): few tokens, a kernel.

    Never while a gradient is wanted or a graph is being compiled.
    """
    if inputs[0].shape[2] > SHORT or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return False
    return library("recurrent", like=inputs[0]) is not None


def short_scan(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the outputs (B, H, N, V) and the last state (B, H, D, V). No gradient.

    Args:
        query: (B, H, N, D), the scale in it.
        key, log_decay: (B, H, N, D); None: nothing is forgotten.
        value: (B, H, N, V).
        memory: (B, H, D, V) before the first token; not changed.
    """
    out: tuple[Tensor, Tensor] = _op(query, key, value, log_decay, memory)
    return out


@torch.library.custom_op("manyheads::recurrent_scan", mutates_args=())
@without_autocast
def _op(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, memory: Tensor
) -> tuple[Tensor, Tensor]:
    lib = library("recurrent", like=query)
    if lib is None:
        return _plain(query, key, value, log_decay, memory)
    batch, heads, length, dim = query.shape
    out = value.new_empty(value.shape)
    after = memory.new_empty(memory.shape)
    inputs = (None if t is None else t.contiguous() for t in (query, key, value, log_decay, memory))
    sizes = (batch * heads, length, dim, value.shape[3], torch.get_num_threads())
    lib("recurrent_scan", *inputs, after, out, sizes)
    return out, after


def _plain(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, memory: Tensor
) -> tuple[Tensor, Tensor]:
    outputs, state = [query.new_zeros(*query.shape[:2], 0, value.shape[3])], memory.clone()
    for t in range(query.shape[2]):
        if log_decay is not None:
            state = state * log_decay[:, :, t, :, None].exp()
        state = torch.addcmul(state, key[:, :, t, :, None], value[:, :, t, None])
        outputs.append(query[:, :, t, None] @ state)
    return torch.cat(outputs, 2), state


@_op.register_fake
def _(query, key, value, log_decay, memory):  # type: ignore[no-untyped-def]
    return value.new_empty(value.shape), memory.new_empty(memory.shape)
