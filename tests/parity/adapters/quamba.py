"""Mamba-1: scan, block and language model. Official tensors are channels first, (B, E, L)."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention import MambaConfig, MambaMixer, selective_scan
from manyheads.models.language.mamba import MambaForCausalLM, MambaLMConfig
from parity.golden import Golden, adapter, not_yet

not_yet(
    "quamba",
    "block_w8a8_naive_static",
    "hadamard",
    "int8_pipeline",
    "lm_w8a8_quamba",
    "observers_and_quantisers",
)


@adapter("quamba", "selective_scan")
def scan(golden: Golden) -> dict[str, Tensor]:
    golden.options("B", "D", "N", "L", "G", "delta_softplus")
    names = [n for n in golden.inputs if n not in ("grad_y", "grad_last_state")]
    leaves = dict(zip(names, golden.leaves(*names), strict=True))
    y, state = selective_scan(
        *(leaves[n] for n in ("u", "delta", "A", "B", "C")),
        d=leaves.get("D"),
        z=leaves.get("z"),
        delta_bias=leaves.get("delta_bias"),
        delta_softplus=golden.config.get("delta_softplus", True),
        initial_state=leaves.get("initial_state"),
    )
    total = (y * golden.inputs["grad_y"]).sum()
    if (grad := golden.inputs.get("grad_last_state")) is not None:
        total = total + (state * grad).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    results = {f"grad.{n}": g for n, g in zip(leaves, grads, strict=True)}
    return results | {"out.y": y, "out.last_state": state}


@adapter("quamba", "mamba_block")
def block(golden: Golden) -> dict[str, Tensor]:
    options = golden.options(
        "d_inner", d_model="embed_dim", d_state="state_dim", d_conv="conv_size",
        expand="expand", dt_rank="dt_rank", conv_bias="conv_bias", bias="proj_bias",
    )  # fmt: skip
    if options.get("dt_rank") == "auto":
        options["dt_rank"] = None
    module = MambaMixer(MambaConfig(**options)).load_official(golden.weights).eval()
    (x,) = golden.leaves("x")
    y = module(x)
    results = {"out.y": y}
    if "grad_y" in golden.inputs or "grad.x" in golden.tensors:
        y.backward(golden.inputs.get("grad_y", torch.ones_like(y)))
        assert x.grad is not None
        weights = module.key_map().to_official(
            {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        )
        results |= {f"grad.{n}": g for n, g in ({"x": x.grad} | weights).items()}
        results |= {f"grad.w.{n}": g for n, g in weights.items()}
    with torch.no_grad():
        state, steps = module.init_state(x.shape[0]), []
        for token in x.unbind(1):
            out, state = module.step(token, state)
            steps.append(out)
        limit = float(golden.meta["atol"])
        torch.testing.assert_close(torch.stack(steps, 1), y, atol=limit, rtol=0)
        whole = module.update(x, module.init_state(x.shape[0]))[1]
        torch.testing.assert_close(tuple(whole), tuple(state), atol=limit, rtol=0)
    return results | {"out.conv_state": state.conv, "out.ssm_state": state.ssm}


@adapter("quamba", "mamba_lm_tiny")
def language_model(golden: Golden) -> dict[str, Tensor]:
    inner = {"d_state", "d_conv", "expand", "dt_rank"}
    official = {k: v for k, v in golden.config.items() if k not in inner}
    official["ssm_cfg"] = {k: v for k, v in golden.config.items() if k in inner}
    # These files state the size of the vocabulary as it is, padding included.
    config = MambaLMConfig.from_official({"pad_vocab_size_multiple": 1} | official)
    model = MambaForCausalLM(config).load_official(golden.weights).eval()
    tokens = golden.inputs["input_ids"]
    logits = model(tokens)
    streamed, state = model.update(tokens[:, :-1], model.init_state(tokens.shape[0]))
    last, _ = model.step(tokens[:, -1], state)
    torch.testing.assert_close(
        torch.cat((streamed, last[:, None]), 1), logits, atol=float(golden.meta["atol"]), rtol=0
    )
    return {"out.logits": logits}
