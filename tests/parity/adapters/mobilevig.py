"""Golden files of MobileViG."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.attention.grid.svga import MaxRelativeConv, svga
from manyheads.layers.keymap import Entry, KeyMap
from manyheads.models.vision.mobilevig import (
    GraphBlock,
    InvertedResidual,
    MobileViG,
    MobileViGConfig,
    graph_block_keys,
    local_block_keys,
    pair_keys,
)
from parity.golden import Golden, adapter


@adapter("mobilevig", "svga_aggregate")
def aggregate(golden: Golden) -> dict[str, Tensor]:
    return {
        f"out.k{step}_{name}": torch.cat((x, svga(x, step=step)), 1)
        for step in golden.config["K"]
        for name, x in golden.inputs.items()
    }


def _run(golden: Golden, made: nn.Module, entries: list[Entry]) -> dict[str, Tensor]:
    keys = KeyMap(*entries)
    made.load_state_dict(keys.to_ours(golden.weights, made.state_dict()))
    (x,) = golden.leaves("x")
    return _with_gradients(golden, made.eval(), x, [made(x)], keys)


@adapter("mobilevig", "module:MRConv4d")
def mrconv(golden: Golden) -> dict[str, Tensor]:
    c = golden.options("cls", "out_channels", in_channels="dim", K="step")
    assert golden.config["out_channels"] == 2 * c["dim"]
    return _run(golden, MaxRelativeConv(**c), pair_keys("mix", "nn"))


@adapter("mobilevig", "grapher_ffn")
def grapher_ffn(golden: Golden) -> dict[str, Tensor]:
    c = golden.options("cls", in_channels="dim", K="step", hidden_features="hidden")
    ratio = c.pop("hidden") / c["dim"]
    return _run(golden, GraphBlock(**c, mlp_ratio=ratio), graph_block_keys("", ""))


@adapter("mobilevig", "module:InvertedResidual")
def inverted_residual(golden: Golden) -> dict[str, Tensor]:
    c = golden.options("cls", dim="dim", mlp_ratio="mlp_ratio")
    return _run(golden, InvertedResidual(**c), local_block_keys("", ""))


@adapter("mobilevig", "model_logits", "tiny_train")
def model(golden: Golden) -> dict[str, Tensor]:
    c = golden.options(
        local_blocks="local_depths",
        local_channels="local_dims",
        global_blocks="global_depths",
        global_channels="global_dims",
        emb_dims="head_dim",
        K="step",
        num_classes="num_classes",
        distillation="distillation",
    )
    made = MobileViG(MobileViGConfig.from_dict({"drop_path": 0.0} | c))
    made.load_official(golden.weights)
    made.set_distilled_training(c["distillation"])
    made.train(golden.meta["kind"] == "tiny_train")
    (x,) = golden.leaves("x")
    out = made(x)
    outs = list(out) if isinstance(out, tuple) else [out]
    return _with_gradients(golden, made, x, outs, made.key_map())


def _with_gradients(
    golden: Golden, made: nn.Module, x: Tensor, outs: list[Tensor], keys: KeyMap
) -> dict[str, Tensor]:
    names = ["out"] if len(outs) == 1 else [f"out{i}" for i in range(len(outs))]
    results: dict[str, Any] = {f"out.{n}": t for n, t in zip(names, outs, strict=True)}
    if all(f"cot_{n}" in golden.inputs for n in names):
        loss = sum((t * golden.inputs[f"cot_{n}"]).sum() for n, t in zip(names, outs, strict=True))
        assert isinstance(loss, Tensor)
        loss.backward()
        results["grad.x"] = x.grad
        gradients = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
        results |= {f"grad.w.{n}": t for n, t in keys.to_official(gradients).items()}
    return results
