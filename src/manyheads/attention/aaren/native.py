"""The kernels of prefix softmax: arguments and results as in the chunked form.

B batch, H heads, N length, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.native import Library

__all__ = ["backward", "forward"]

_SEGMENT = 64  # values of a task, as in csrc/prefix.cpp


def _sizes(scores: Tensor, values: Tensor) -> tuple[int, ...]:
    batch, heads, length = scores.shape
    return batch * heads, length, values.shape[3], torch.get_num_threads()


def forward(
    lib: Library,
    scores: Tensor,
    values: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    weighted: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return all outputs (B, H, N, V), m and u after each token (B, H, N), and the last w."""
    out, w = values.new_empty(values.shape), weighted.new_empty(weighted.shape)
    m, u = (scores.new_empty(scores.shape) for _ in range(2))
    inputs = (t.contiguous() for t in (scores, values, maximum, normalizer, weighted))
    lib("prefix_forward", *inputs, out, m, u, w, _sizes(scores, values))
    return out, m, u, w


def backward(
    lib: Library,
    scores: Tensor,
    values: Tensor,
    maximum: Tensor,
    out: Tensor,
    m: Tensor,
    u: Tensor,
    grad_out: Tensor,
    grad_u: Tensor,
    grad_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of scores, values, and of the first u and w."""
    segments = max(1, -(-values.shape[3] // _SEGMENT))
    grad_scores = scores.new_empty(segments, *scores.shape)
    grad_u_first = maximum.new_empty(segments, *maximum.shape)
    grad_values = values.new_empty(values.shape)
    grad_w_first = grad_final.new_empty(grad_final.shape)
    inputs = (scores, values, maximum, out, m, u, grad_out, grad_u, grad_final)
    lib("prefix_backward", *(t.contiguous() for t in inputs), grad_scores, grad_values,
        grad_u_first, grad_w_first, _sizes(scores, values))  # fmt: skip
    return grad_scores.sum(0), grad_values, grad_u_first.sum(0), grad_w_first
