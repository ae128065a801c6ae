"""Flowformer: flows, the attention module in both forms, the GPT and the vision model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention import FlowAttention, FlowConfig, flow, flow_flows
from manyheads.models.language.flowformer import FlowformerGPT, FlowformerGPTConfig
from manyheads.models.vision.flowformer import FlowformerVision, FlowformerVisionConfig
from parity.golden import Golden, adapter


@adapter("flowformer", "attn_self", "attn_normal_cross")
def attention(golden: Golden) -> dict[str, Tensor]:
    options = golden.options(
        "cls", "drop_out",
        d_input="embed_dim", d_model="inner_dim", d_output="out_dim", n_heads="num_heads",
        eps="eps",
    )  # fmt: skip
    causal = {"Flow_Attention": False, "Flow_Attention_Causal": True}[golden.config["cls"]]
    module = FlowAttention(FlowConfig(is_causal=causal, **options))
    module.load_official(golden.weights).eval()
    names = [n for n in ("x", "queries", "keys", "values") if n in golden.inputs]
    leaves = golden.leaves(*names)
    if names == ["x"]:
        y = module(leaves[0])
    else:
        y = module(leaves[0], context=leaves[1], context_values=leaves[2])
    results = {"out.y": y}
    if "grad_output" in golden.inputs:
        own = dict(module.named_parameters())
        total = (y * golden.inputs["grad_output"]).sum()
        grads = torch.autograd.grad(total, [*leaves, *own.values()])
        weights = module.key_map().to_official(dict(zip(own, grads[len(leaves) :], strict=True)))
        results |= {f"grad.{n}": g for n, g in zip(names, grads, strict=False)}
        for key, grad in weights.items():
            results |= {f"grad.{key}": grad, f"grad.w.{key}": grad}
    return results


@adapter("flowformer", "op_intermediates", "op_causal_intermediates")
def intermediates(golden: Golden) -> dict[str, Tensor]:
    options = golden.options(kernel="kernel", eps="eps", clamp="clamp", outer_eps="outer_eps")
    options["is_causal"] = golden.meta["kind"] == "op_causal_intermediates"
    q, k, v = golden.leaves("q", "k", "v")
    y = flow(q, k, v, **options)
    results = {"out.y": y}
    results |= {f"out.{n}": t for n, t in flow_flows(q, k, **options)._asdict().items()}
    for name in ("grad_output", "grad_y", "cot_y"):
        if name in golden.inputs:
            grads = torch.autograd.grad((y * golden.inputs[name]).sum(), (q, k, v))
            results |= {f"grad.{n}": g for n, g in zip("qkv", grads, strict=True)}
    return results


@adapter("flowformer", "op_variants")
def variants(golden: Golden) -> dict[str, Tensor]:
    options = golden.options(kernel="kernel", eps="eps")
    q, k, v = (golden.inputs[n] for n in "qkv")
    k_causal, v_causal = golden.inputs["k_causal"], golden.inputs["v_causal"]
    return {
        "out.normal_clamp1": flow(q, k, v, clamp=1.0, **options),
        "out.normal_no_clamp": flow(q, k, v, clamp=None, **options),
        "out.normal_clamp1_outer_eps": flow(q, k, v, clamp=1.0, outer_eps=1e-6, **options),
        "out.causal_clamp5": flow(q, k_causal, v_causal, is_causal=True, clamp=5.0, **options),
        "out.causal_clamp10": flow(q, k_causal, v_causal, is_causal=True, clamp=10.0, **options),
    }


@adapter("flowformer", "gpt_tiny")
def language_model(golden: Golden) -> dict[str, Tensor]:
    model = FlowformerGPT(FlowformerGPTConfig.from_official(golden.config))
    model.load_official(golden.weights).eval()
    tokens = golden.inputs["idx"]
    logits = model(tokens)
    streamed, state = model.update(tokens[:, :-1], model.init_state(tokens.shape[0]))
    last, _ = model.step(tokens[:, -1], state)
    torch.testing.assert_close(
        torch.cat((streamed, last[:, None]), 1), logits, atol=float(golden.meta["atol"]), rtol=0
    )
    results = {"out.logits": logits}
    if "targets" in golden.inputs:
        targets = golden.inputs["targets"].flatten()
        results["out.loss"] = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1)
    return results


@adapter("flowformer", "vision_tiny")
def vision(golden: Golden) -> dict[str, Tensor]:
    model = FlowformerVision(FlowformerVisionConfig.from_official(golden.config))
    model.load_official(golden.weights).eval()
    x = golden.inputs["x"]
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    return {"out.features": features, "out.logits": model(x)}
