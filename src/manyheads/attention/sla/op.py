"""Sparse-linear attention on whole, padded and packed sequences.

B batch, H heads, N queries, M keys, D head dim, V value dim, P query blocks, Q key blocks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from manyheads.attention.block_sparse.op import attend_visits
from manyheads.attention.block_sparse.visits import Visits
from manyheads.attention.sla.blocks import BlockRule, Selection, select
from manyheads.attention.sla.linear import feature_map_of, linear_all, linear_marginal
from manyheads.attention.sla.rows import Rows
from manyheads.errors import unknown_name
from manyheads.layers.heads import check_qkv
from manyheads.layers.ragged import map_packed

__all__ = ["VARIANTS", "SLAParts", "Variant", "check_options", "sla", "sla_parts"]

Variant = Literal["main", "sla1", "paper"]
VARIANTS = ("main", "sla1", "paper")


class SLAParts(NamedTuple):
    """The two branches, and the map of their blocks.

    Attributes:
        o_sparse: (B, H, N, V), softmax over the critical blocks.
        o_linear: (B, H, N, V), the linear branch before its projection.
        block_map: (B, H, P, Q) int8: 1 critical, 0 linear (of the main variant: linear only,
            as its linear branch reads all), -1 neither (negligible, or without real tokens).
            With a mask, blocks are those of the real tokens of a row, moved to its front.
    """

    o_sparse: Tensor
    o_linear: Tensor
    block_map: Tensor

    @property
    def sparsity(self) -> float:
        """Share of the map that softmax attention does not compute (padding counts as such)."""
        return 1.0 - float((self.block_map == 1).double().mean())


def check_options(
    *, topk: float, negligible: float, block_q: int, block_k: int, feature_map: str, variant: str
) -> None:
    """Check the options of :func:`sla`.

    Raises:
        ValueError: names the option, its value and what is possible.
    """
    if variant not in VARIANTS:
        raise unknown_name("variant", variant, VARIANTS)
    feature_map_of(feature_map)
    for name, share in (("topk", topk), ("negligible", negligible)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} {share} is a share of the key blocks: give 0 to 1")
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size < 1:
            raise ValueError(f"{name} {size} tokens are no block: give at least 1")


def sla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    topk: float = 0.05,
    negligible: float = 0.1,
    block_q: int = 64,
    block_k: int = 64,
    feature_map: str = "softmax",
    variant: Variant = "main",
    scale: float | None = None,
    is_causal: bool = False,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Sparse-linear attention (2509.24006): softmax over few key blocks, the rest linear.

    Approximate, and lossy in a pretrained model until that model is fine-tuned with it; looks
    ahead, no causal form. O_s + O_l projectionᵀ + bias, where O_s is softmax attention to the key
    blocks whose mean key has the largest products with a query block's mean query, and O_l linear
    attention. The choice of blocks carries no gradient. About topk times the time of softmax
    attention, and O(N D V); no N x M matrix, forward or backward.

    Args:
        query: (B, H, N, D).
        key: (B, H_kv, M, D); each key head serves H / H_kv consecutive query heads.
        value: (B, H_kv, M, V).
        projection: (V, V), output features first as in ``nn.Linear``, shared by the heads. None:
            as at the start of training, when it is 0; the linear branch is then not computed.
        bias: (V) of the projection.
        topk: share of key blocks that are critical, rounded down; at least one block is.
        negligible: share that neither branch reads, the lowest; "paper" alone has it.
        block_q, block_k: tokens a block; the last block of a sequence may hold fewer.
        feature_map: of the linear branch, "softmax" (over D), "elu" (elu + 1) or "relu".
        variant: which keys the linear branch reads. "main" (the released code): all, with 1e-5 in
            the denominator; "sla1" (its first release): those that are not critical; "paper":
            those that are neither critical nor negligible.
        scale: factor on the scores, D ** -0.5 unless given.
        is_causal: must be False.
        mask: (B, M), True = a real key; padding may stand on either side, and holes. Blocks are
            formed of real tokens: padding enters no mean, no softmax and no linear sum.
        query_mask: (B, N), True = a real query; ``mask`` unless given where N = M, else all.
            Padded queries, and queries without any real key, give 0.
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1, for N = M; each has blocks
            of its own.

    Returns:
        (B, H, N, V) in the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit, an option is unknown or out of range, or is_causal is True.

    Example:
        >>> q = k = v = torch.randn(1, 2, 1000, 32)
        >>> sla(q, k, v, torch.eye(32), topk=0.2).shape
        torch.Size([1, 2, 1000, 32])
    """
    given = BlockRule(topk, negligible, block_q, block_k)
    rule = _checked(query, key, value, given, feature_map, variant, is_causal)
    _check_projection(projection, bias, value.shape[-1])
    if cu_seqlens is not None:
        if mask is not None or query_mask is not None:
            raise ValueError("give masks or cu_seqlens, not both: packed tokens are all real")
        check_qkv(query, key, value, same_length=True)
        (out,) = map_packed(
            lambda q, k, v, m: sla(
                q, k, v, projection, bias, topk=topk, negligible=negligible, block_q=block_q,
                block_k=block_k, feature_map=feature_map, variant=variant, scale=scale, mask=m,
            ),
            (query, key, value),
            cu_seqlens,
        )  # fmt: skip
        return out
    rows = Rows(query, key, value, mask, query_mask)
    with torch.autocast(query.device.type, enabled=False):
        selection, out = _sparse(rows, rule, scale)
        if projection is not None:
            weight = projection.to(out)
            if variant == "main":
                q, k = _features(rows, feature_map)
                out = out + linear_all(q, k, rows.value, weight)
            else:
                out = out + _linear(rows, rule, selection, feature_map, variant) @ weight.mT
        if bias is not None:
            out = out + bias.to(out)
    return rows.back(out)


def sla_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    topk: float = 0.05,
    negligible: float = 0.1,
    block_q: int = 64,
    block_k: int = 64,
    feature_map: str = "softmax",
    variant: Variant = "main",
    scale: float | None = None,
    is_causal: bool = False,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> SLAParts:
    """Return the two branches of :func:`sla` and its block map; approximate, with look-ahead.

    o_sparse + o_linear projectionᵀ + bias is the output of :func:`sla`, whose arguments these are.
    The branches can be differentiated, the map cannot.

    Raises:
        ValueError: as :func:`sla`.

    Example:
        >>> q = k = v = torch.randn(1, 2, 1000, 32)
        >>> parts = sla_parts(q, k, v, topk=0.25)
        >>> parts.block_map.shape, parts.sparsity
        (torch.Size([1, 2, 16, 16]), 0.75)
    """
    given = BlockRule(topk, negligible, block_q, block_k)
    rule = _checked(query, key, value, given, feature_map, variant, is_causal)
    rows = Rows(query, key, value, mask, query_mask)
    with torch.autocast(query.device.type, enabled=False):
        selection, sparse = _sparse(rows, rule, scale)
        linear = _linear(rows, rule, selection, feature_map, variant)
    return SLAParts(rows.back(sparse), rows.back(linear), selection.block_map)


def _sparse(rows: Rows, rule: BlockRule, scale: float | None) -> tuple[Selection, Tensor]:
    scale = rows.query.shape[-1] ** -0.5 if scale is None else scale
    selection = select(rows.query, rows.key, rule, rows.lengths)
    out, _ = attend_visits(
        rows.query * scale,
        rows.key,
        rows.value,
        Visits.from_table(selection.table),
        block_q=rule.block_q,
        block_k=rule.block_k,
        lengths=rows.lengths[1],
    )
    return selection, out


def _features(rows: Rows, feature_map: str) -> tuple[Tensor, Tensor]:
    phi = feature_map_of(feature_map)
    query, key = phi(rows.query), phi(rows.key)
    if rows.front is not None:  # φ(0) need not be 0
        key = key.masked_fill(~rows.front[:, None, :, None], 0)
    return query, key


def _linear(
    rows: Rows, rule: BlockRule, selection: Selection, feature_map: str, variant: Variant
) -> Tensor:
    query, key = _features(rows, feature_map)
    if variant == "main":
        return linear_all(query, key, rows.value)
    return linear_marginal(query, key, rows.value, selection.block_map, rule.block_q, rule.block_k)


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: BlockRule,
    feature_map: str,
    variant: str,
    is_causal: bool,
) -> BlockRule:
    """Check what both functions are given; return the rule as this variant has it."""
    check_qkv(query, key, value)
    check_options(**rule._asdict(), feature_map=feature_map, variant=variant)
    for name, t in (("query", query), ("key", key)):
        if not t.shape[2]:
            raise ValueError(f"{name} has length 0: there is no block to attend with")
    if is_causal:
        raise ValueError(
            "sla has no causal form: blocks are chosen by means over whole blocks, which look "
            "ahead; pass is_causal=False, or use another mechanism"
        )
    return rule if variant == "paper" else rule._replace(negligible=0.0)


def _check_projection(projection: Tensor | None, bias: Tensor | None, dim: int) -> None:
    if projection is not None and projection.shape != (dim, dim):
        raise ValueError(
            f"projection has shape {tuple(projection.shape)}, expected (value_dim, value_dim) = "
            f"({dim}, {dim})"
        )
    if bias is not None and (projection is None or bias.shape != (dim,)):
        raise ValueError(f"bias needs a projection and the shape ({dim},) of its output features")
