"""Gated linear attention: official layouts (B, T, H, K) are converted here."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention import GatedLinearAttention, GLAConfig, gla_update, gla_weights
from manyheads.attention.gla import GLAState
from manyheads.models.language.causal import next_token_loss
from manyheads.models.language.gla import GLAForCausalLM, GLALMConfig
from parity.golden import Golden, adapter


@adapter("gla", "op_basic", "op_varlen")
def op(golden: Golden) -> dict[str, Tensor]:
    golden.options("B", "T", "H", "K", "V", "scale")
    names = [n for n in ("q", "k", "v", "g", "initial_state") if n in golden.inputs]
    leaves = dict(zip(names, golden.leaves(*names), strict=True))
    memory = leaves.get("initial_state")
    out, state = gla_update(
        None if memory is None else GLAState(memory),
        *(leaves[n].transpose(1, 2) for n in ("q", "k", "v", "g")),
        scale=golden.config.get("scale"),
        cu_seqlens=golden.inputs.get("cu_seqlens"),
    )
    results = {"out.o": out.transpose(1, 2), "out.final_state": state.memory}
    if "grad_o" in golden.inputs:
        total = (results["out.o"] * golden.inputs["grad_o"]).sum()
        if "grad_final_state" in golden.inputs:
            total = total + (state.memory * golden.inputs["grad_final_state"]).sum()
        grads = torch.autograd.grad(total, [leaves[n] for n in names])
        official = ["h0" if n == "initial_state" else n for n in names]
        results |= {f"grad.{n}": g for n, g in zip(official, grads, strict=True)}
    return results


@adapter("gla", "op_parallel_form")
def parallel_form(golden: Golden) -> dict[str, Tensor]:
    golden.options("B", "T", "H", "K", "V")
    q, k, v, g = (golden.inputs[n].transpose(1, 2) for n in "qkvg")
    out, _ = gla_update(None, q, k, v, g, implementation="parallel")
    return {"out.A": gla_weights(q, k, g), "out.o": out.transpose(1, 2)}


@adapter("gla", "layer_basic")
def layer(golden: Golden) -> dict[str, Tensor]:
    options = golden.options(
        "mode", "layer_idx", "use_short_conv", "conv_size",
        hidden_size="embed_dim", expand_k="expand_k", expand_v="expand_v",
        num_heads="num_heads", num_kv_heads="num_kv_heads", feature_map="feature_map",
        conv_bias="conv_bias", use_output_gate="output_gate", gate_fn="gate_fn",
        elementwise_affine="norm_affine", norm_eps="norm_eps", clamp_min="clamp_min",
        gate_logit_normalizer="gate_normalizer", gate_low_rank_dim="gate_low_rank",
        fuse_norm="fuse_norm",
    )  # fmt: skip
    if golden.config.get("use_short_conv"):
        options["conv_size"] = golden.config.get("conv_size", 4)
    module = GatedLinearAttention(GLAConfig(**options)).load_official(golden.weights).eval()
    mask = golden.inputs.get("attention_mask")
    return {"out.y": module(golden.inputs["hidden_states"], mask=mask)}


@adapter("gla", "lm_tiny")
def language_model(golden: Golden) -> dict[str, Tensor]:
    model = GLAForCausalLM(GLALMConfig.from_official(golden.config))
    model.load_official(golden.weights).eval()
    tokens = golden.inputs["input_ids"]
    logits = model(tokens)
    streamed, state = model.update(tokens[:, :-1], model.init_state(tokens.shape[0]))
    last, state = model.step(tokens[:, -1], state)
    torch.testing.assert_close(
        torch.cat((streamed, last[:, None]), 1), logits, atol=float(golden.meta["atol"]), rtol=0
    )
    return {
        "out.logits": logits,
        "out.loss": next_token_loss(logits, tokens),
        **{
            f"out.recurrent_state_layer{i}": own.attention.memory
            for i, own in enumerate(state.layers)
        },
    }
