"""Routing attention, its k-means and layers, and the language model of the official graph."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention import (
    KMeansState,
    RoutingAttention,
    RoutingConfig,
    kmeans_loss,
    kmeans_sums,
    kmeans_update,
    routing,
    routing_distances,
    routing_normalize,
    routing_select,
    spherical_loss,
    spherical_routing,
)
from manyheads.models.language.routing import RoutingLM, RoutingLMConfig, shift_right
from manyheads.models.language.routing_pytorch import (
    RoutingTransformerLM,
    RoutingTransformerLMConfig,
)
from parity.golden import Golden, adapter

_CLUSTER = "cluster_attention/cluster_attention/"


@adapter("routing", "cluster_bidirectional_padded")
def clusters(golden: Golden) -> dict[str, Tensor]:
    """All files of one attention call; the published call chooses over the whole sequence."""
    c = golden.config
    golden.options(
        "batch", "heads", "seq", "head_dim", "clusters", "window", "masked", "share_qk",
        "relative", "strided", "beta",
    )  # fmt: skip
    (q,) = golden.leaves("q")
    k = q if c["share_qk"] else golden.inputs["k"]
    means = golden.weights[f"{_CLUSTER}means"]
    tables = {
        f"relative_{n}": golden.weights.get(f"{_CLUSTER}relative_positions_{n}s/embeddings")
        for n in ("key", "value")
    }
    assert (tables["relative_key"] is not None) == c["relative"]
    padding = golden.inputs.get("padding")
    out = routing(
        q,
        k,
        golden.inputs["v"],
        means,
        window=c["window"],
        is_causal=c["masked"],
        selection="official",
        strided=c["strided"],
        mask=None if padding is None else padding == 0,
        **tables,
    )
    out.sum().backward()
    assert q.grad is not None
    results = {"out.out": out, "grad.q": q.grad}
    loss = torch.zeros(())
    for name, x in (("q", q), ("k", k)):
        x = routing_normalize(x.detach())
        distances = routing_distances(x, means)
        results[f"out.{name}_dist"] = distances
        results[f"out.{name}_index"] = routing_select(distances, c["window"], strided=c["strided"])
        loss = loss + kmeans_loss(x, means, beta=c["beta"])
    return results | {"out.clustering_loss": loss}


@adapter("routing", "online_kmeans_ema")
def kmeans(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    golden.options("batch", "heads", "seq", "dim", "clusters", "decay", "beta", "epsilon", "ema")
    state = KMeansState(*(golden.inputs[f"{n}0"] for n in KMeansState._fields))
    results = {}
    for i in range(2):
        x = golden.inputs[f"x{i}"]
        results[f"out.dist{i}"] = routing_distances(x, state.means)
        results[f"out.loss{i}"] = kmeans_loss(x, state.means, beta=c["beta"], ema=c["ema"])
        sums = kmeans_sums(x, state.means, mixed_counts=True)
        state = kmeans_update(state, *sums, decay=c["decay"])
        results |= {f"out.{n}{i + 1}": t for n, t in state._asdict().items()}
    return results


@adapter("routing", "mha_local_plus_cluster")
def layer(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    options = golden.options(
        "batch",
        "seq",
        "cluster_heads",
        hidden="embed_dim",
        local_heads="local_heads",
        clusters="clusters",
        window="window",
        query_block="block",
        memory_flange="flange",
        max_relative_position="relative",
        share_qk="share_qk",
        masked="is_causal",
    )
    module = RoutingAttention(
        RoutingConfig(
            **options, num_heads=c["local_heads"] + c["cluster_heads"], selection="official"
        )
    ).eval()
    scope = "self_attention/"
    module.load_official({k.removeprefix(scope): t for k, t in golden.weights.items()})
    (x,) = golden.leaves("x")
    y, loss = module.forward_with_loss(x)
    y.sum().backward()
    assert x.grad is not None
    return {"out.y": y, "out.clustering_loss": loss, "grad.x": x.grad}


@adapter("routing", "tiny_lm")
def language_model(golden: Golden) -> dict[str, Tensor]:
    config = RoutingLMConfig.from_official(golden.config)
    model = RoutingLM(config).load_official(golden.weights).eval()
    targets = golden.inputs["targets"].long()
    entropy, clustering = model.loss(targets)
    return {
        "out.logits": model(shift_right(targets)),
        "out.training_loss": entropy,
        "out.extra_loss": clustering,
    }


@adapter("routing", "torch_kmeans_attention_causal_shared")
def pytorch_attention(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    golden.options("b", "h", "t", "d", "num_clusters", "window", "causal", "shared_qk")
    (q,) = golden.leaves("q")
    k = q if c["shared_qk"] else golden.inputs["k"]
    masks = {
        n: None if (m := golden.inputs.get(f)) is None else m.bool()
        for n, f in (("mask", "query_mask"), ("key_mask", "key_mask"))
    }
    means = golden.weights["kmeans.means"]
    out = spherical_routing(
        q,
        k,
        golden.inputs["v"],
        means,
        window=c["window"],
        is_causal=c["causal"],
        share_qk=c["shared_qk"],
        memory_key=golden.weights["mem_key"],
        memory_value=golden.weights["mem_value"],
        **masks,
    )
    out.sum().backward()
    assert q.grad is not None
    tokens = (q,) if c["shared_qk"] else (q, k)
    loss = spherical_loss(*tokens, means=means)
    return {"out.out": out, "out.aux_loss": loss, "grad.q": q.grad}


@adapter("routing", "torch_tiny_lm")
def pytorch_language_model(golden: Golden) -> dict[str, Tensor]:
    config = RoutingTransformerLMConfig.from_official(golden.config)
    model = RoutingTransformerLM(config).load_official(golden.weights).eval()
    mask = golden.inputs.get("input_mask")
    logits, loss = model.forward_with_loss(
        golden.inputs["ids"], mask=None if mask is None else mask.bool()
    )
    return {"out.logits": logits, "out.aux_loss": loss}
