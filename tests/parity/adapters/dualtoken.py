"""Golden files of DualToken-ViT: LightViT's official parts, and the reconstruction's equations."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.attention.dual_token import ConvEncoder, TokenModule
from manyheads.models.vision.dualtoken import (
    BiAttnMLP,
    ConvStem,
    DualTokenBlock,
    DualTokenConfig,
    DualTokenViT,
    Merge,
)
from parity.golden import Golden, adapter


def _filled(golden: Golden, made: nn.Module) -> Any:
    made.load_state_dict(golden.weights)
    return made.eval()


def _finished(
    golden: Golden, made: nn.Module, leaves: dict[str, Tensor], outputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Run backward where the file has cotangents; return outputs and gradients."""
    terms = [(t * golden.inputs[f"cot_{n}"]).sum() for n, t in outputs.items()
             if f"cot_{n}" in golden.inputs]  # fmt: skip
    results = {f"out.{n}": t for n, t in outputs.items()}
    if terms:
        sum(terms[1:], terms[0]).backward()
        results |= {f"grad.{n}": t.grad for n, t in leaves.items() if t.grad is not None}
        named = made.named_parameters()
        results |= {f"grad.w.{n}": p.grad for n, p in named if p.grad is not None}
    return results


@adapter("dualtoken", "module:ConvStem")
def stem(golden: Golden) -> dict[str, Tensor]:
    c = golden.options("cls", embed_dim="dim")
    (x,) = golden.leaves("x")
    made = _filled(golden, ConvStem(x.shape[1], **c))
    return _finished(golden, made, {"x": x}, {"out": made(x).flatten(1, 2)})


@adapter("dualtoken", "module:BiAttnMlp")
def biattn(golden: Golden) -> dict[str, Tensor]:
    c = golden.options("cls", in_features="dim", hidden_features="hidden", act_ratio="act_ratio")
    (x,) = golden.leaves("x")
    made = _filled(golden, BiAttnMLP(**c))
    return _finished(golden, made, {"x": x}, {"out": made(x)})


@adapter("dualtoken", "module:ResidualMergePatch")
def merge(golden: Golden) -> dict[str, Tensor]:
    c = golden.options("cls", dim="dim", out_dim="out_dim", num_tokens="tokens")
    tokens = c.pop("tokens")
    (x,) = golden.leaves("x")
    made = _filled(golden, Merge(**c))
    places = x.shape[1] - tokens
    sizes = re.findall(r"(\d+)\s*\*\s*(\d+)", golden.meta["call"])
    size = next((int(h), int(w)) for h, w in sizes if int(h) * int(w) == places)
    image, g = made(x[:, tokens:].unflatten(1, size), x[:, :tokens])
    return _finished(golden, made, {"x": x}, {"out": torch.cat((g, image.flatten(1, 2)), 1)})


@adapter("dualtoken", "conv_encoder")
def conv_encoder(golden: Golden) -> dict[str, Tensor]:
    (x,) = golden.leaves("x")
    made = _filled(golden, ConvEncoder(**golden.config))
    return _finished(golden, made, {"x": x}, {"out": made(x)})


@adapter("dualtoken", "token_module")
def token_module(golden: Golden) -> dict[str, Tensor]:
    x, g = golden.leaves("x", "g")
    c = dict(golden.config)
    made = _filled(golden, TokenModule(c.pop("dim"), c.pop("heads"), **c))
    return _finished(golden, made, {"x": x, "g": g}, made(x, g)._asdict())


@adapter("dualtoken", "dual_block")
def dual_block(golden: Golden) -> dict[str, Tensor]:
    x, g = golden.leaves("x", "g")
    c = dict(golden.config)
    made = _filled(golden, DualTokenBlock(c.pop("dim"), c.pop("heads"), **c))
    new_x, new_g = made((x, g))
    return _finished(golden, made, {"x": x, "g": g}, {"x": new_x, "g": new_g})


@adapter("dualtoken", "model_logits")
def model(golden: Golden) -> dict[str, Tensor]:
    names = {"dims": "embed_dims", "heads": "num_heads", "img_size": "image_size"}
    c = {names.get(k, k): v for k, v in golden.config.items()}
    (x,) = golden.leaves("x")
    made = _filled(golden, DualTokenViT(DualTokenConfig.from_dict(c)))
    return _finished(golden, made, {"x": x}, {"out": made(x)})
