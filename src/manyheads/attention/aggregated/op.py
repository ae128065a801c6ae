"""The public function of aggregated attention, with its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.aggregated.definition import aggregated_reference
from manyheads.attention.aggregated.fast import shifted
from manyheads.errors import unknown_name

__all__ = ["IMPLEMENTATIONS", "aggregated"]

IMPLEMENTATIONS = ("auto", "shift", "reference")


def aggregated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    *,
    size: tuple[int, int],
    window_size: int = 3,
    scale: Tensor | float = 1.0,
    local_bias: Tensor | None = None,
    pooled_bias: Tensor | None = None,
    query_embedding: Tensor | None = None,
    tokens: Tensor | None = None,
    token_bias: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """Attend to the window around each place of a map and to a pooled view, under one softmax.

    Not softmax attention over all places: a layer needs training. Queries and keys are scaled to
    length 1 here. Scores and softmax are float32 at least. Shi, TransNeXt (2311.17132).
    O(N (w² + P) C); windows are read in place, never copied.

    Args:
        query, key, value: (B, h, N, D), N = H · W places row by row. Fastest where memory holds
            them with places last (``.mT`` of a contiguous tensor).
        pooled_key, pooled_value: (B, h, P, D) of the pooled map.
        size: H and W.
        window_size: w, odd.
        scale: of the cosines, a number or (h, 1, 1); times the log of how many keys there are.
        local_bias: (h, w²), added to the scores of window cells.
        pooled_bias: (h, N, P), added to the scores of pooled keys.
        query_embedding: QE, (h, 1, D), added to the unit query before it is scaled.
        tokens: T, (h, D, w²): their products with unit queries join the weights behind the softmax.
        token_bias: b, (h, 1, w²), joins them too.
        dropout: rate, on the softmax weights.
        implementation: "auto", "shift" or "reference" (unfolded windows).

    Returns:
        (B, h, N, D).

    Raises:
        ValueError: shapes that do not fit each other, an even window, an unknown implementation.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 35, 8) for _ in range(3))
        >>> far = torch.randn(2, 1, 2, 6, 8)
        >>> aggregated(q, k, v, *far, size=(7, 5), scale=4.0).shape
        torch.Size([1, 2, 35, 8])
    """
    if implementation not in IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, IMPLEMENTATIONS)
    _check(query, key, value, pooled_key, pooled_value, size, window_size)
    shapes = {
        "local_bias": (local_bias, (query.shape[1], window_size**2)),
        "pooled_bias": (pooled_bias, (query.shape[1], query.shape[2], pooled_key.shape[2])),
        "query_embedding": (query_embedding, (query.shape[1], 1, query.shape[3])),
        "tokens": (tokens, (query.shape[1], query.shape[3], window_size**2)),
        "token_bias": (token_bias, (query.shape[1], 1, window_size**2)),
    }
    for name, (tensor, wanted) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {wanted}")
    dtype = query.dtype
    run = aggregated_reference if implementation == "reference" else shifted
    out = run(
        *(_wide(t) for t in (query, key, value, pooled_key, pooled_value)),
        size=size,
        window_size=window_size,
        scale=_wide(scale) if isinstance(scale, Tensor) else scale,
        local_bias=_wide_or_none(local_bias),
        pooled_bias=_wide_or_none(pooled_bias),
        query_embedding=_wide_or_none(query_embedding),
        tokens=_wide_or_none(tokens),
        token_bias=_wide_or_none(token_bias),
        dropout=dropout,
    )
    return out.to(dtype)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    size: tuple[int, int],
    window: int,
) -> None:
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window_size {window} must be odd, so that a window has a middle")
    if query.ndim != 4:
        raise ValueError(f"query has {query.ndim} axes, expected 4: (batch, heads, places, dim)")
    if query.shape[2] != size[0] * size[1]:
        raise ValueError(
            f"query has {query.shape[2]} places, a map of {size[0]} x {size[1]} has "
            f"{size[0] * size[1]}: give size=(rows, columns) of the map"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected query's {tuple(query.shape)}"
            )
    batch, heads, _, dim = query.shape
    if pooled_key.ndim != 4 or (*pooled_key.shape[:2], pooled_key.shape[3]) != (batch, heads, dim):
        raise ValueError(
            f"pooled_key has shape {tuple(pooled_key.shape)}, expected ({batch}, {heads}, any "
            f"number of pooled places, {dim})"
        )
    if pooled_key.shape[2] == 0:
        raise ValueError("pooled_key has 0 places: pool the map to at least 1 x 1")
    if pooled_value.shape != pooled_key.shape:
        raise ValueError(
            f"pooled_value has shape {tuple(pooled_value.shape)}, expected pooled_key's "
            f"{tuple(pooled_key.shape)}"
        )


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _wide_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else _wide(x)
