"""Golden files of EfficientFormer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.grid.distance import DistanceAttention
from manyheads.layers.keymap import Entry, KeyMap
from manyheads.models.vision.efficientformer import (
    EfficientFormer,
    EfficientFormerConfig,
    MapBlock,
    TokenBlock,
)
from manyheads.models.vision.efficientformer.keys import attention_keys, block_keys
from manyheads.train.distillation import distillation_loss
from parity.golden import Golden, adapter


def _run(
    golden: Golden, made: nn.Module, entries: list[Entry], **options: Any
) -> dict[str, Tensor]:
    keys = KeyMap(*entries)
    made.load_state_dict(keys.to_ours(golden.weights, made.state_dict()))
    (x,) = golden.leaves("x")
    out = made.train(golden.meta["kind"].endswith(":train"))(x, **options)
    results = {"out.out": out}
    if "cot_out" in golden.inputs:
        (out * golden.inputs["cot_out"]).sum().backward()
        assert x.grad is not None
        results["grad.x"] = x.grad
        gradients = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
        results |= {f"grad.w.{n}": t for n, t in keys.to_official(gradients).items()}
    return results


def _attention(c: dict[str, Any]) -> tuple[DistanceAttention, tuple[int, int]]:
    side = c.pop("resolution")
    made = DistanceAttention(
        c.pop("dim"),
        grid=(side, side),
        num_heads=c.pop("num_heads"),
        key_dim=c.pop("key_dim"),
        value_ratio=c.pop("attn_ratio"),
    )
    return made, (side, side)


@adapter("efficientformer", "module:Attention", "module:Attention:train")
def attention(golden: Golden) -> dict[str, Tensor]:
    c = dict(golden.config)
    made, grid = _attention(c)
    assert set(c) == {"cls"}, f"the adapter does not know {sorted(c)}"
    return _run(golden, made, attention_keys("", "", grid=grid), grid=grid)


@adapter("efficientformer", "module:Meta4D")
def map_block(golden: Golden) -> dict[str, Tensor]:
    c = golden.options("cls", dim="dim", pool_size="pool_size", mlp_ratio="mlp_ratio")
    return _run(golden, MapBlock(**c), block_keys("", "", tokens=False))


@adapter("efficientformer", "module:Meta3D")
def token_block(golden: Golden) -> dict[str, Tensor]:
    c = dict(golden.config)
    dim, ratio = c["dim"], c.pop("mlp_ratio")
    mixer, grid = _attention(c)
    assert set(c) == {"cls"}, f"the adapter does not know {sorted(c)}"
    made = TokenBlock(dim, mixer, mlp_ratio=ratio)
    return _run(golden, made, block_keys("", "", tokens=True, grid=grid), grid=grid)


@adapter("efficientformer", "model_logits", "tiny_train", "dense_features")
def model(golden: Golden) -> dict[str, Tensor]:
    c = dict(golden.config)
    factor = c.pop("input_upsample", 1)
    side = c.pop("resolution", 7)
    names = {"layers": "depths", "embed_dims": "embed_dims", "vit_num": "token_blocks",
             "mlp_ratios": "mlp_ratio", "num_classes": "num_classes",
             "distillation": "distillation", "fork_feat": "stage_norms"}  # fmt: skip
    unknown = set(c) - set(names)
    assert not unknown, f"the adapter does not know {sorted(unknown)}"
    config = {names[k]: v for k, v in c.items()} | {"image_size": 32 * side}
    made = EfficientFormer(EfficientFormerConfig.from_dict(config))
    made.load_official(golden.weights)
    made.set_distilled_training(config.get("distillation", True))
    made.train(golden.meta["kind"] == "tiny_train")
    out = made(F.interpolate(golden.inputs["x"], scale_factor=factor, mode="nearest"))
    if isinstance(out, Tensor):
        return {"out.out": out}
    return {f"out.out{i}": t for i, t in enumerate(out)}


@adapter("efficientformer", "distillation_loss")
def loss(golden: Golden) -> dict[str, Tensor]:
    c = golden.options("base", alpha="weight", tau="temperature")
    cls, dist = golden.leaves("cls", "dist")
    total, results = torch.zeros(()), {}
    for kind in ("none", "soft", "hard"):
        found = distillation_loss(
            (cls, dist), golden.inputs["labels"], golden.inputs["teacher"], kind=kind, **c
        )
        results[f"out.{kind}"] = found
        total = total + found * golden.inputs[f"cot_{kind}"]
    total.backward()
    return results | {"grad.cls": cls.grad, "grad.dist": dist.grad}
