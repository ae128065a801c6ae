"""TransNormer: official layouts (length, batch, dim) are converted here."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention import DiagAttention, DiagConfig, NormAttention, NormConfig
from manyheads.models.language.transnormer import TransNormerLM, TransNormerLMConfig
from manyheads.models.language.transnormer_encoder import (
    TransNormerEncoder,
    TransNormerEncoderConfig,
)
from parity.golden import Golden, adapter

_LAYER_TYPES = {1: "norm", 2: "diag"}


def _attention(golden: Golden, layout: str) -> NormAttention | DiagAttention:
    """Build the layer that a file's class and options name, with its weights, for evaluation."""
    config = golden.config
    assert config.get("core_matrix", 1) == 1, "core_matrix other than the rotation"
    assert config.get("p_matrix", 1) in (1, 3), "p_matrix other than identity and Householder"
    assert config.get("group_type", "chunk") == "chunk"
    options = golden.options(
        "cls", "act_fun", "use_softmax", "norm_type", "p_matrix", "core_matrix", "group_type",
        "chunk_size",
        embed_dim="embed_dim", d_model="embed_dim", num_heads="num_heads", n_heads="num_heads",
        theta_learned="learned_angles", use_urpe="lrpe", use_lrpe="lrpe", causal="is_causal",
    )  # fmt: skip
    options["householder"] = config.get("p_matrix", 1) == 3
    options.setdefault("is_causal", False)
    options["layout"] = layout
    norm = config["norm_type"]
    options["norm"] = {"simplermsnorm": "simplerms"}.get(norm, norm)
    if config["cls"] == "NormLinearAttention":
        variant = {"elu": "t1", "1+elu": "t2"}.get(config["act_fun"], "t1")
        module = NormAttention(
            NormConfig(variant=variant, feature_map=config["act_fun"], **options)
        )
    else:
        assert config["cls"] == "NormLocalAttention", config["cls"]
        assert config["use_softmax"] or config["act_fun"] == "relu", config["act_fun"]
        module = DiagAttention(
            DiagConfig(
                variant="t2" if config["use_softmax"] else "t1",
                block_size=config["chunk_size"],
                pad_keys=True,
                mask_after_softmax=layout == "lra",
                **options,
            )
        )
    return module.load_official(golden.weights).eval()


@adapter("transnormer", "norm_attention_t1_bidir", "diag_attention_t1_bidir")
def attention(golden: Golden) -> dict[str, Tensor]:
    module = _attention(golden, "fairseq")
    (x,) = golden.leaves("x")
    y = module(x.transpose(0, 1)).transpose(0, 1)
    if module.config.is_causal:
        steps, state = [], module.init_state(x.shape[1])
        for token in x:
            out, state = module.step(token, state)
            steps.append(out)
        torch.testing.assert_close(torch.stack(steps), y, atol=float(golden.meta["atol"]), rtol=0)
    results = {"out.y": y}
    if "grad_output" in golden.inputs:
        (results["grad.x"],) = torch.autograd.grad((y * golden.inputs["grad_output"]).sum(), x)
    return results


@adapter("transnormer", "lra_linear_t1_batch")
def lra_attention(golden: Golden) -> dict[str, Tensor]:
    (x,) = golden.leaves("x")
    y = _attention(golden, "lra")(x)
    results = {"out.y": y}
    if "grad_output" in golden.inputs:
        (results["grad.x"],) = torch.autograd.grad((y * golden.inputs["grad_output"]).sum(), x)
    return results


def _sizes(golden: Golden, *dropped: str, **renamed: str) -> dict:
    options = golden.options(
        "arch", "attention_types", *dropped,
        heads="num_heads", chunk_size="block_size", vocab="vocab_size", ffn_dim="mlp_width",
        padding_idx="padding_idx", **renamed,
    )  # fmt: skip
    options["variant"] = golden.config["arch"].rpartition("_")[2]
    options["layer_types"] = tuple(_LAYER_TYPES[t] for t in golden.config["attention_types"])
    return options


@adapter("transnormer", "lm_t1_tiny")
def language_model(golden: Golden) -> dict[str, Tensor]:
    options = _sizes(golden, decoder_embed_dim="embed_dim", decoder_layers="num_layers")
    model = TransNormerLM(TransNormerLMConfig(**options)).load_official(golden.weights).eval()
    tokens = golden.inputs["tokens"]
    hidden = model.hidden(tokens)
    logits = model(tokens)
    streamed, state = model.update(tokens[:, :-1], model.init_state(tokens.shape[0]))
    last, _ = model.step(tokens[:, -1], state)
    torch.testing.assert_close(
        torch.cat((streamed, last[:, None]), 1), logits, atol=float(golden.meta["atol"]), rtol=0
    )
    return {
        "out.logits": logits,
        "out.hidden_after_embed": hidden[0].transpose(0, 1),
        "out.hidden_last": hidden[-1].transpose(0, 1),
    }


@adapter("transnormer", "roberta_t1_tiny")
def encoder(golden: Golden) -> dict[str, Tensor]:
    options = _sizes(
        golden, "no_scale_embedding", encoder_embed_dim="embed_dim", layers="num_layers",
        normalize_before="pre_norm", layernorm_embedding="embedding_norm",
        learned_pos="learned_positions", max_positions="max_positions",
    )  # fmt: skip
    options["scale_embedding"] = not golden.config.get("no_scale_embedding", True)
    model = TransNormerEncoder(TransNormerEncoderConfig(**options))
    model.load_official(golden.weights).eval()
    results = {}
    for name in golden.inputs:
        suffix = name.removeprefix("tokens")
        results[f"out.logits{suffix}"] = model(golden.inputs[name])
        results[f"out.encoder{suffix}"] = model.features(golden.inputs[name]).transpose(0, 1)
    return results
