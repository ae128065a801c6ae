"""Aaren: masks are inverted and the empty state's -inf is written as -1e30 here."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention import AarenState, combine, prefix_attention, prefix_states
from manyheads.models.language.aaren import (
    AarenLayer,
    AarenLayerConfig,
    AarenStack,
    AarenStackConfig,
)
from parity.golden import Golden, adapter

EMPTY = -1e30


def state_out(m: Tensor) -> Tensor:
    return m.masked_fill(m == -torch.inf, EMPTY)


def state_in(m: Tensor) -> Tensor:
    return m.masked_fill(m <= EMPTY, -torch.inf)


@adapter("aaren", "prefix_scan", "prefix_scan_masked_extreme")
def prefix_scan(golden: Golden) -> dict[str, Tensor]:
    golden.options("B", "H", "N", "d")
    scores, values = golden.leaves("s", "v")
    mask = golden.inputs.get("valid")
    out, last = prefix_attention(scores, values, mask=mask)
    states = prefix_states(scores, values, mask=mask)
    atol = float(golden.meta["atol"])
    for form in ("chunked", "recurrent", "scan"):
        for size in (1, 4, 64):
            other, end = prefix_attention(
                scores, values, mask=mask, implementation=form, chunk_size=size
            )
            torch.testing.assert_close(other, out, atol=atol, rtol=0)
            torch.testing.assert_close(end.m, last.m, atol=0, rtol=0)
            torch.testing.assert_close(end.w, last.w, atol=atol, rtol=0)
    results = {
        "out.o": out,
        "out.m": state_out(states.m),
        "out.u": states.u,
        "out.w": states.w,
    }
    if "grad_o" in golden.inputs:
        total = (out * golden.inputs["grad_o"]).sum()
        grads = torch.autograd.grad(total, (scores, values))
        results |= {"grad.s": grads[0], "grad.v": grads[1]}
    return results


@adapter("aaren", "combine")
def combine_(golden: Golden) -> dict[str, Tensor]:
    golden.options()
    i = golden.inputs
    a, b = (AarenState(state_in(i[f"m{x}"]), i[f"u{x}"], i[f"w{x}"]) for x in "AB")
    merged = combine(a, b)
    return {"out.m": state_out(merged.m), "out.u": merged.u, "out.w": merged.w}


def layer_options(golden: Golden, *dropped: str) -> dict[str, object]:
    return golden.options(
        *dropped,
        d_model="embed_dim", nhead="num_heads", dim_feedforward="ff_dim",
        activation="activation", norm_first="norm_first", num_layers="num_layers",
        layer_norm_eps="norm_eps", bias="bias",
    )  # fmt: skip


@adapter("aaren", "layer")
def layer(golden: Golden) -> dict[str, Tensor]:
    options = layer_options(golden)
    names = {"block_postnorm": False, "block_prenorm": True}
    layers = {
        name: AarenLayer(AarenLayerConfig(**options | {"norm_first": first}))
        .load_official(golden.weights)
        .eval()
        for name, first in names.items()
    }
    (x,) = golden.leaves("x")
    results = {f"out.{name}": own(x) for name, own in layers.items()}
    attention = layers["block_postnorm"].attention
    results["out.attn"] = out = attention(x)
    if "pad" in golden.inputs:
        results["out.attn_padded"] = attention(x, mask=~golden.inputs["pad"])
    if "grad_attn" in golden.inputs:
        total = (out * golden.inputs["grad_attn"]).sum()
        weights = dict(attention.named_parameters())
        grads = torch.autograd.grad(total, (x, *weights.values()))
        results["grad.x"] = grads[0]
        official = attention.key_map().to_official(dict(zip(weights, grads[1:], strict=True)))
        for name, grad in official.items():
            key = name if name == "query" else f"self_attn.{name}"
            results |= {f"grad.{key}": grad, f"grad.w.{key}": grad}
    return results


@adapter("aaren", "stack")
def stack(golden: Golden) -> dict[str, Tensor]:
    model = AarenStack(AarenStackConfig(**layer_options(golden)))
    model.load_official(golden.weights).eval()
    x = golden.inputs["x"]
    mask = ~golden.inputs["pad"] if "pad" in golden.inputs else None
    hidden = model.intermediates(x, mask=mask)
    out, state = model.update(x, model.init_state(x.shape[0]), mask=mask)
    atol = float(golden.meta["atol"])
    torch.testing.assert_close(out, model(x, mask=mask), atol=atol, rtol=0)
    if mask is None:
        streamed, tokens = model.init_state(x.shape[0]), []
        for t in range(x.shape[1]):
            token, streamed = model.step(x[:, t], streamed)
            tokens.append(token)
        torch.testing.assert_close(torch.stack(tokens, 1), out, atol=atol, rtol=0)
    results = {f"out.h{i}": h for i, h in enumerate(hidden, 1)}
    for i, own in enumerate(state.layers):
        results |= {
            f"out.state{i}.m": state_out(own.m),
            f"out.state{i}.u": own.u,
            f"out.state{i}.w": own.w,
        }
    return results
