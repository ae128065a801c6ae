"""Shared atoms: the files store matrices (inputs, outputs), ours are those of nn.Linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.attention import softmax
from manyheads.compress.masa import kl_drift, low_rank_refinement, matrix_pca, runs_of_layers
from manyheads.layers.heads import merge_heads, split_heads
from manyheads.layers.sharing import AtomDictionary, SharedLinear
from parity.golden import Golden, adapter


def dictionary(atoms: Tensor, coefficients: Tensor) -> AtomDictionary:
    return AtomDictionary(atoms.mT, coefficients)


@adapter("masa", "mix_linear")
def mix_linear(golden: Golden) -> dict[str, Tensor]:
    golden.options("layers", "atoms", "d_in", "d_out")
    shared = dictionary(golden.weights["atoms"], golden.weights["coefficients"])
    (x,) = golden.leaves("x")
    layers = [SharedLinear([(shared, i)]) for i in range(shared.num_layers)]
    y = torch.stack([layer(x) for layer in layers])
    (y * golden.inputs["upstream"]).sum().backward()
    for layer, own in zip(layers, y, strict=True):
        assert torch.equal(layer.to_dense()(x), own), "the exported layer gives other numbers"
    return {
        "out.W": torch.stack([layer.weight.mT for layer in layers]),
        "out.y": y,
        "grad.x": x.grad,
        "grad.atoms": shared.atoms.grad.mT,
        "grad.coefficients": shared.coefficients.grad,
    }


@adapter("masa", "masa_qkv_stack")
def stack(golden: Golden) -> dict[str, Tensor]:
    golden.options("layers", "atoms", "d", "heads", "causal", "mode")
    c = golden.config
    names = c["mode"].lower()
    stores = {
        n: dictionary(golden.weights[f"atoms.{n}"], golden.weights[f"coefficients.{n}"])
        for n in names
    }
    dense = golden.weights.get("o")
    outputs = None if dense is None else nn.Parameter(dense.clone())
    length = golden.inputs["x"].shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool)
    if c["causal"]:
        allowed = allowed.tril()
    if (mask := golden.inputs.get("key_mask")) is not None:
        allowed = allowed & mask[:, None, None]
    (x,) = golden.leaves("x")
    hidden, kept = x, []
    for i in range(c["layers"]):
        layers = {n: SharedLinear([(store, i)]) for n, store in stores.items()}
        q, k, v = (split_heads(layers[n](hidden), c["heads"]) for n in "qkv")
        mixed = merge_heads(softmax(q, k, v, attn_mask=allowed))
        hidden = hidden + (layers["o"](mixed) if outputs is None else mixed @ outputs[i])
        kept.append(hidden)
    (hidden * golden.inputs["upstream"]).sum().backward()
    results = {"out.x_layers": torch.stack(kept), "grad.x": x.grad}
    if outputs is not None:
        results["grad.o"] = outputs.grad
    for n, store in stores.items():
        results[f"grad.atoms.{n}"] = store.atoms.grad.mT
        results[f"grad.coefficients.{n}"] = store.coefficients.grad
    return results


@adapter("masa", "matrix_pca")
def pca(golden: Golden) -> dict[str, Tensor]:
    golden.options("layers", "atoms", "d", "h")
    found = matrix_pca(golden.inputs["W"], golden.config["atoms"])
    flat = found.atoms.flatten(1)
    return {
        "out.reconstruction": found.reconstruction(),
        "out.projector": flat.mT @ flat,
        "out.singular_values": found.singular_values,
        "out.error": found.error,
    }


@adapter("masa", "local_refinement")
def refinement(golden: Golden) -> dict[str, Tensor]:
    golden.options("samples", "d", "h", "rank")
    x, residual = golden.inputs["X"], golden.inputs["residual"]
    count = len(x)
    moments = x.mT @ x / count
    found = low_rank_refinement(residual, moments, rank=golden.config["rank"])
    plain = low_rank_refinement(residual, None, rank=golden.config["rank"])

    def error(correction: Tensor) -> Tensor:
        return (x @ (residual - correction)).square().sum() / count

    return {
        "out.autocorrelation": moments,
        "out.cholesky_upper": found.root,
        "out.singular_values": found.singular_values,
        "out.low_rank": found.down @ found.up,
        "out.error": error(found.down @ found.up),
        "out.error_plain_svd": error(plain.down @ plain.up),
    }


@adapter("masa", "grouping")
def grouping(golden: Golden) -> dict[str, Tensor]:
    golden.options("layers", "batch", "tokens", "d", "vocab", "groups")
    means = golden.inputs["hidden"].flatten(1, 2).mean(1)
    log_probs, drift = kl_drift(means, golden.inputs["W_out"])
    groups = runs_of_layers(drift, golden.config["groups"])
    numbers = [g for g, members in enumerate(groups) for _ in members]
    return {
        "out.log_probs": log_probs,
        "out.kl": drift,
        "out.group": torch.tensor(numbers),
    }
