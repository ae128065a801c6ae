"""Clipped softmax, gated attention, quantisers, and BERT and OPT in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.clipped_softmax import clip_softmax
from manyheads.layers.keymap import KeyMap, rename
from manyheads.models.language.quantizable import (
    BERTSelfAttention,
    HostAttention,
    OPTSelfAttention,
    QuantizableConfig,
)
from manyheads.models.language.quantizable.config import read_official
from parity.golden import Golden, adapter, not_yet

not_yet(
    "quantizable",
    "bert_mlm_clipped_w8a8",
    "opt_lm_gated_w8a8",
    "outlier_metrics",
    "quantizers",
    "range_estimators",
)

_HOSTS = {"hidden_size": "dim", "num_attention_heads": "heads", "embed_dim": "dim"}
_HOSTS |= {"num_heads": "heads"}


@adapter("quantizable", "clipped_softmax")
def softmax(golden: Golden) -> dict[str, Tensor]:
    golden.options("pairs_gamma_eta")
    results = {}
    for i, (gamma, eta) in enumerate(golden.config["pairs_gamma_eta"]):
        (data,) = golden.leaves("data")
        y = clip_softmax(data, gamma=gamma, eta=eta)
        (grad,) = torch.autograd.grad(y, data, golden.inputs["upstream"])
        results |= {f"out.y{i}": y, f"grad.data{i}": grad}
    return results


def _host(golden: Golden, kind: type[HostAttention], **options) -> HostAttention:
    values = read_official(golden.config, _HOSTS, ("is_decoder",))
    dim, heads = values.pop("dim"), values.pop("heads")
    return kind(dim, heads, QuantizableConfig(**values), **options)


def _attend(golden: Golden, module: HostAttention, pairs: dict[str, str]) -> dict[str, Tensor]:
    entries = [rename(f"{a}.{k}", f"{b}.{k}") for a, b in pairs.items() for k in ("weight", "bias")]
    if module.gate is not None:
        entries += module.gate.entries("gate", "alpha")
    module.load_state_dict(KeyMap(*entries).to_ours(golden.weights, module.state_dict()))
    module.eval()
    (x,) = golden.leaves("hidden_states")
    seen = module.context(x, golden.inputs["attention_mask"])
    y = module(x, golden.inputs["attention_mask"])
    (grad,) = torch.autograd.grad(y, x, golden.inputs["upstream"])
    results = {"grad.hidden_states": grad, "out.context": y, "out.attn_output": y}
    results |= {"out.attention_probs": seen.weights, "out.attn_weights": seen.weights}
    return results if seen.gate is None else results | {"out.gate": seen.gate}


@adapter("quantizable", "bert_attn_clipped_alpha")
def bert_attention(golden: Golden) -> dict[str, Tensor]:
    module = _host(golden, BERTSelfAttention, project=False)
    return _attend(golden, module, {"q_proj": "query", "k_proj": "key", "v_proj": "value"})


@adapter("quantizable", "opt_attn_clipped_alpha")
def opt_attention(golden: Golden) -> dict[str, Tensor]:
    module = _host(golden, OPTSelfAttention)
    return _attend(golden, module, {f"{n}_proj": f"{n}_proj" for n in ("q", "k", "v", "out")})
