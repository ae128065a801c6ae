"""Clipped softmax, gated attention, quantisers, and BERT and OPT in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.clipped_softmax import clip_softmax
from manyheads.compress.quantizable import (
    RangeEstimator,
    Scheme,
    UniformQuantizer,
    inf_norm,
    kurtosis,
    simulate_quantization,
)
from manyheads.layers.keymap import KeyMap, rename
from manyheads.models.language.causal import next_token_loss
from manyheads.models.language.quantizable import (
    BERTSelfAttention,
    HostAttention,
    OPTSelfAttention,
    QuantizableBERT,
    QuantizableBERTConfig,
    QuantizableConfig,
    QuantizableOPT,
    QuantizableOPTConfig,
    masked_token_loss,
)
from manyheads.models.language.quantizable.config import read_official
from parity.golden import Golden, adapter

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


@adapter("quantizable", "outlier_metrics")
def outliers(golden: Golden) -> dict[str, Tensor]:
    eps = golden.options(eps="eps").get("eps", 1e-6)
    x = golden.inputs["x"]
    return {"out.inf_norm": inf_norm(x), "out.kurtosis": kurtosis(x, eps=eps)}


@adapter("quantizable", "quantizers")
def quantizers(golden: Golden) -> dict[str, Tensor]:
    golden.options("n_bits")
    results = {}
    for name in {n.rpartition(".")[0] for n in golden.outputs}:
        kind, _, case = name.partition("_")
        data = {"shifted": "x_shifted", "nonneg": "x_nonneg"}.get(case, "x")
        (x,) = golden.leaves(data)
        per_channel = case == "perchannel"
        quantizer = UniformQuantizer(
            bits=int(kind.removeprefix("asym").removeprefix("sym")),
            symmetric=kind.startswith("sym"),
            per_channel=per_channel,
        )
        low, high = (x.amin(1), x.amax(1)) if per_channel else (x.min(), x.max())
        if case == "clip":
            low, high = torch.tensor(-1.5), torch.tensor(2.0)
        quantizer.set_range(low.detach(), high.detach())
        y = quantizer(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        column = (-1, 1) if per_channel else ()
        zero = quantizer.zero_point
        results |= {
            f"out.{name}.dequant": y,
            f"out.{name}.int": quantizer.to_integers(x),
            f"out.{name}.scale": quantizer.scale.reshape(column),
            f"out.{name}.zero_point": zero.reshape(column) if zero.ndim else zero,
            f"grad.{name}.x": grad,
        }
    return results


_ESTIMATORS = {"current_minmax": "minmax", "running_minmax": "running"}
_ESTIMATORS |= {"grid": "mse_grid", "golden_section": "mse_golden"}


@adapter("quantizable", "range_estimators")
def range_estimators(golden: Golden) -> dict[str, Tensor]:
    golden.options("momentum", "num_candidates", "range_margin", "outputs")
    c, results = golden.config, {}
    for name, case in c["outputs"].items():
        kind = case.get("method", case["estimator"])
        scheme = Scheme(
            bits=case.get("n_bits", 8),
            symmetric=case.get("symmetric", False),
            per_channel=case["per_channel"],
            estimator=_ESTIMATORS[kind],
            momentum=case.get("momentum", c["momentum"]),
            percentile=case.get("percentile"),
            candidates=c["num_candidates"],
            margin=c["range_margin"],
        )
        estimator, found = RangeEstimator(scheme), []
        for batch in golden.inputs["batches"][: len(golden.outputs[name])]:
            ends = estimator.update(batch.abs() if case.get("absolute_input") else batch)
            found.append(torch.stack([e.double().reshape(-1) for e in ends]))
        results[f"out.{name}"] = torch.stack(found)
    return results


@adapter("quantizable", "bert_mlm_clipped_w8a8")
def bert_in_8_bits(golden: Golden) -> dict[str, Tensor]:
    model = QuantizableBERT(QuantizableBERTConfig.from_official(golden.config))
    model.load_official(golden.weights).eval()
    inputs = {
        "tokens": golden.inputs["input_ids"],
        "mask": golden.inputs["attention_mask"],
        "token_types": golden.inputs["token_type_ids"],
    }
    logits = model(**inputs)
    results = {
        "out.hidden_last": model.features(**inputs),
        "out.logits": logits,
        "out.loss": masked_token_loss(logits, golden.inputs["labels"]),
    }
    batches = [{"tokens": t, "mask": torch.ones_like(t)} for t in golden.inputs["calibration_ids"]]
    small = simulate_quantization(model, batches, skip=["head_*"])
    logits = small(**inputs)
    loss = masked_token_loss(logits, golden.inputs["labels"])
    return results | {"out.q.logits": logits, "out.q.loss": loss}


@adapter("quantizable", "opt_lm_gated_w8a8")
def opt_in_8_bits(golden: Golden) -> dict[str, Tensor]:
    model = QuantizableOPT(QuantizableOPTConfig.from_official(golden.config))
    model.load_official(golden.weights).eval()
    tokens, mask = golden.inputs["input_ids"], golden.inputs["attention_mask"]
    logits = model(tokens, mask=mask)
    results = {"out.logits": logits, "out.loss": next_token_loss(logits, tokens)}
    batches = [{"tokens": t, "mask": torch.ones_like(t)} for t in golden.inputs["calibration_ids"]]
    small = simulate_quantization(
        model,
        batches,
        weights=Scheme(symmetric=True, estimator="mse_grid"),
        activations=Scheme(estimator="running", percentile=99.999),
    )
    logits = small(tokens, mask=mask)
    return results | {"out.q.logits": logits, "out.q.loss": next_token_loss(logits, tokens)}
