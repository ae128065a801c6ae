"""Heads: splitting, merging and repeating them. B batch, N length, H heads, D head dim."""

from __future__ import annotations

from torch import Tensor

__all__ = ["check_qkv", "merge_heads", "repeat_kv", "split_heads"]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H*D) to (B, H, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) to (B, N, H*D)."""
    return x.transpose(1, 2).flatten(-2)


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """Repeat key-value heads so that each serves heads / H_kv consecutive query heads.

    Raises:
        ValueError: the number of query heads is no multiple of the number of key-value heads.
    """
    kv_heads = x.shape[1]
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads are not a multiple of {kv_heads} key-value heads: "
            "choose num_kv_heads that divides num_heads"
        )
    return x if kv_heads == heads else x.repeat_interleave(heads // kv_heads, dim=1)


def check_qkv(query: Tensor, key: Tensor, value: Tensor, *, same_length: bool = False) -> None:
    """Check (B, H, N, D) tensors against each other.

    Raises:
        ValueError: names the tensor, the axis, both sizes and the fix.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.ndim != 4:
            raise ValueError(
                f"{name} has {t.ndim} axes, expected (batch, heads, length, head_dim): "
                "use .unflatten(-1, (heads, -1)).transpose(1, 2) on a (B, N, C) tensor"
            )
    for axis, a, b, names in (
        ("batch", query.shape[0], key.shape[0], "query and key"),
        ("batch", key.shape[0], value.shape[0], "key and value"),
        ("heads", key.shape[1], value.shape[1], "key and value"),
        ("length", key.shape[2], value.shape[2], "key and value"),
        ("head_dim", query.shape[3], key.shape[3], "query and key"),
    ):
        if a != b:
            raise ValueError(f"{axis} of {names} differ: {a} and {b}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads are not a multiple of {key.shape[1]} key-value heads"
        )
    if same_length and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query length {query.shape[2]} differs from key length {key.shape[2]}: "
            "the causal form needs one key for each query"
        )
