"""Names and layouts of the official TensorFlow checkpoints, for one layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manyheads.attention.routing.config import RoutingConfig
from manyheads.layers.keymap import Entry, convert, rename

__all__ = ["kernel", "layer_entries", "with_averages"]


def with_averages(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the averages behind centroids where a file has the centroids alone.

    They start where official training starts them.
    """
    full = dict(weights)
    for name, means in weights.items():
        scope, _, leaf = name.rpartition("/")
        if leaf == "means":
            full.setdefault(f"{scope}/ema_means", means)
            full.setdefault(f"{scope}/ema_count", torch.zeros_like(means[..., 0]))
    return full


def kernel(ours: str, official: str) -> Entry:
    """A dense layer, whose official kernel is (in, out)."""
    return convert(f"{ours}.weight", f"{official}/kernel", _turned, _turned)


def layer_entries(ours: str, theirs: str, config: RoutingConfig) -> list[Entry]:
    """Return the rules of a layer whose names stand below two prefixes."""
    rules = [kernel(f"{ours}{n}_proj", f"{theirs}{n}") for n in "qkv"]
    scopes = (
        ("kmeans", "cluster_tables", "cluster_attention/cluster_attention"),
        ("strided_kmeans", "strided_tables", "cluster_strided_attention/cluster_strided_attention"),
        (None, "local_tables", "local_nd"),
    )
    for kmeans, tables, place in scopes:
        scope = f"{theirs}attention_nd/{place}"
        if kmeans is not None:
            names = ("means", "ema_count", "ema_means") if config.ema else ("means",)
            rules += [rename(f"{ours}{kmeans}.{n}", f"{scope}/{n}") for n in names]
        rules += [
            rename(f"{ours}{tables}.{n}", f"{scope}/relative_positions_{n}s/embeddings")
            for n in ("key", "value")
        ]
    return [
        *rules,
        kernel(f"{ours}head_proj", f"{theirs}attention_nd/dense"),
        kernel(f"{ours}out_proj", f"{theirs}output_transform"),
    ]


def _turned(x: Tensor) -> Tensor:
    return x.T.contiguous()
