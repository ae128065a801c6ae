"""Routing attention on whole, padded, packed and continued sequences.

B batch, H heads, N length, D head dim of queries and keys, V head dim of values, C clusters,
W window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.routing.definition import (
    RoutingState,
    Selection,
    routing_distances,
    routing_normalize,
)
from manyheads.attention.routing.fast import attend_strict, attend_top
from manyheads.errors import unknown_name
from manyheads.layers.heads import check_qkv
from manyheads.layers.ragged import check_mask, compact, map_packed

__all__ = ["check_routing", "check_selection", "routing", "strict"]

_SELECTIONS = ("auto", "strict", "top", "official")


def check_selection(selection: str, *, is_causal: bool, strided: bool = False) -> str:
    """Return the selection with "auto" decided.

    Raises:
        ValueError: unknown, or strict where there is no order, or where tokens are strided.
    """
    if selection not in _SELECTIONS:
        raise unknown_name("selection", selection, _SELECTIONS)
    if selection == "auto":
        selection = "strict" if is_causal and not strided else "top"
    if selection == "strict" and (strided or not is_causal):
        what = "strided=True looks at the whole sequence" if strided else "it needs is_causal=True"
        raise ValueError(f"selection='strict': {what}; pass selection='top'")
    return selection


def routing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    *,
    window: int = 64,
    is_causal: bool = False,
    selection: Selection = "auto",
    strided: bool = False,
    relative_key: Tensor | None = None,
    relative_value: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 0.01,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention inside clusters of similar tokens (2003.05997). Sparse; needs training.

    Queries and keys are layer-normalised, compared with the centroids, and attended to without
    1 / sqrt(D). A token that no centroid chooses gives 0. O(N C D + N W D), and O(N^1.5 D) with
    about sqrt(N) clusters and window.

    Which tokens meet is the selection:

    - "strict": a token joins the cluster of its own nearest centroid and sees the last W
      members up to itself. Nothing looks ahead, and steps equal the whole.
    - "top": every centroid chooses its W nearest tokens, balanced. **Looks ahead**: also with
      ``is_causal``, which hides later keys by their places, later tokens decide who is chosen.
    - "official": the same as the published code has it: keys are hidden by their rank among the
      chosen, which with separate queries and keys **shows later ones**; padding may be chosen;
      keys whose value is all zero are hidden; a query that sees no key averages all.
    - "auto": "strict" where causal, else "top".

    Args:
        query, key: (B, H, N, D); the same tensor for both saves half of the routing.
        value: (B, H, N, V).
        means: (H, C, D) centroids; no gradient reaches them.
        window: W, tokens a cluster.
        is_causal: token i sees tokens up to i.
        selection: see above.
        strided: every centroid chooses evenly in its order of distance, near and far ones.
        relative_key, relative_value: (2R + 1, D and V) added to a key and its value by the rank of
            the key in the cluster less that of the query, clipped to ±R.
        mask: (B, N), True = a real token; the outputs of others are 0 (not so in "official").
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1; each on its own.
        eps: outputs are divided by the number of clusters they come from plus this; 0.01 is the
            official constant, which also holds in "strict".
        dropout_p: of attention weights.

    Returns:
        (B, H, N, V) in the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit, or a selection that is not possible.

    Example:
        >>> q = v = torch.randn(1, 2, 100, 16)
        >>> routing(q, q, v, torch.randn(2, 4, 16), window=25).shape
        torch.Size([1, 2, 100, 16])
    """
    check_routing(query, key, value, means, window, relative_key, relative_value)
    mask = check_mask(mask, query.shape[0], query.shape[2])
    selection = check_selection(selection, is_causal=is_causal, strided=strided)  # type: ignore[assignment]
    is_shared = key is query
    if cu_seqlens is not None:
        if mask is not None or selection == "official":
            raise ValueError(
                "cu_seqlens excludes mask and selection='official', which lets padding be chosen: "
                "packed tokens are all real"
            )
        (out,) = map_packed(
            lambda q, k, v, m: routing(
                q, q if is_shared else k, v, means, window=window, is_causal=is_causal,
                selection=selection, strided=strided, relative_key=relative_key,
                relative_value=relative_value, mask=m, eps=eps, dropout_p=dropout_p,
            ),
            (query, None if is_shared else key, value),
            cu_seqlens,
        )  # fmt: skip
        return out
    if selection == "strict":
        return strict(
            None,
            query,
            key,
            value,
            means,
            window=window,
            tables=(relative_key, relative_value),
            mask=mask,
            eps=eps,
            dropout_p=dropout_p,
        )[0]
    dtype = query.dtype
    q, k, v = _wide(query, key, value)
    moved = compact(mask) if mask is not None and selection != "official" else None
    if moved is not None:
        q, v = moved.gather(q, dim=2), moved.gather(v, dim=2)
        k = q if is_shared else moved.gather(k, dim=2)
    hidden = None
    if selection == "official":
        hidden = (v == 0).all(-1)
        if mask is not None:
            hidden = hidden | ~mask[:, None]
    with torch.autocast(q.device.type, enabled=False):
        q = routing_normalize(q)
        out = attend_top(
            q,
            q if is_shared else routing_normalize(k),
            v,
            means.detach(),
            window=window,
            is_causal=is_causal,
            is_shared=is_shared,
            official=selection == "official",
            strided=strided,
            tables=(relative_key, relative_value),
            lengths=None if moved is None else moved.mask.sum(1),
            hidden=hidden,
            eps=eps,
            dropout_p=dropout_p,
        )
    if moved is not None:
        out = moved.scatter(out, dim=2).masked_fill(~moved.mask[:, None, :, None], 0)
    return out.to(dtype)


def strict(
    state: RoutingState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    *,
    window: int,
    tables: tuple[Tensor | None, Tensor | None],
    mask: Tensor | None,
    eps: float,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and the new keys with their clusters and values."""
    is_shared = key is query
    q, k, v = _wide(query, key, value)
    clusters = means.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q = routing_normalize(q)
        k = q if is_shared else routing_normalize(k)
        own = routing_distances(q.detach(), means.detach()).argmin(-1)
        theirs = own if is_shared else routing_distances(k.detach(), means.detach()).argmin(-1)
        if mask is not None:
            # Padded keys join a cluster that no query has, padded queries one without keys.
            theirs = theirs.masked_fill(~mask[:, None], clusters)
            own = theirs if is_shared else own.masked_fill(~mask[:, None], clusters + 1)
        all_keys, all_values, ids = k, v, theirs
        if state is not None:
            kept, kept_values, kept_ids = _members(state)
            all_keys = torch.cat((kept.to(k), k), 2)
            all_values = torch.cat((kept_values.to(v), v), 2)
            ids = torch.cat((kept_ids, theirs), 2)
        out = attend_strict(
            q,
            all_keys,
            all_values,
            own,
            ids,
            window=window,
            is_shared=is_shared and state is None,
            tables=tables,
            eps=eps,
            dropout_p=dropout_p,
        )
    if mask is not None:
        out = out.masked_fill(~mask[:, None, :, None], 0)
    return out.to(query.dtype), k, theirs, v


def _members(state: RoutingState) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, values and cluster numbers of a state, the oldest of each cluster first."""
    clusters, window = state.key.shape[2:4]
    slots = torch.arange(window, device=state.key.device)
    count = state.members[..., None]
    index = ((count - window).clamp_min(0) + slots) % window  # (B, H, C, W)
    numbers = torch.arange(clusters, device=index.device)[:, None].expand(index.shape)
    keys, values = (
        t.gather(3, index[..., None].expand(t.shape)).flatten(2, 3)
        for t in (state.key, state.value)
    )
    return keys, values, numbers.masked_fill(slots >= count, clusters + 2).flatten(2)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def check_routing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    window: int,
    relative_key: Tensor | None,
    relative_value: Tensor | None,
) -> None:
    check_qkv(query, key, value, same_length=True)
    heads, dim = query.shape[1], query.shape[3]
    if key.shape[1] != heads:
        raise ValueError(
            f"heads of query and key differ: {heads} and {key.shape[1]}; every routing head has "
            "its own centroids, repeat the key heads"
        )
    if means.ndim != 3 or means.shape[0] != heads or means.shape[2] != dim:
        raise ValueError(
            f"means has shape {tuple(means.shape)}, expected (heads, clusters, head_dim) = "
            f"({heads}, C, {dim})"
        )
    if window < 1:
        raise ValueError(f"window {window} must be at least 1")
    for name, table, size in (
        ("relative_key", relative_key, dim),
        ("relative_value", relative_value, value.shape[3]),
    ):
        if table is not None and (table.ndim != 2 or table.shape[1] != size or not len(table) % 2):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}, expected (2 R + 1, {size}): one row for "
                "each distance −R to R"
            )
