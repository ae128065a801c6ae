"""Golden files of the MetaFormer paper."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from manyheads.attention.grid import build_mixer
from manyheads.attention.grid.basic import Pooling
from manyheads.models.vision.metaformer import MetaFormer, MetaFormerBlock, MetaFormerConfig
from parity.golden import Golden, adapter

_NORMS = {"GroupNorm": "group", "LayerNormChannel": "channel"}
_MIXERS = {"pooling": "pool", "attention": "attention", "spatial_fc": "spatial_fc",
           "identity": "identity"}  # fmt: skip


def _mixer(official: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    options = dict(official)
    return _MIXERS[options.pop("type")], options


@adapter("metaformer", "pooling_edges")
def pooling(golden: Golden) -> dict[str, Tensor]:
    return {
        f"out.p{size}_{name}": Pooling(size)(x)
        for size in golden.config["pool_sizes"]
        for name, x in golden.inputs.items()
    }


@adapter("metaformer", "module:MetaFormerBlock", "module:PoolFormerBlock")
def block(golden: Golden) -> dict[str, Tensor]:
    c = dict(golden.config)
    kind = c.pop("cls")
    if kind == "PoolFormerBlock":
        name, options = "pool", {"pool_size": c.pop("pool_size")}
    else:
        name, options = _mixer(c.pop("token_mixer"))
    dim = c.pop("dim")
    made = MetaFormerBlock(
        dim,
        build_mixer(name, dim, **options),
        mlp_ratio=c.pop("mlp_ratio"),
        norm=_NORMS[c.pop("norm")],
        layer_scale=1e-5 if c.pop("use_layer_scale") else None,
    )
    assert not c, f"the adapter does not know {sorted(c)}"
    made.load_state_dict(golden.weights)
    (x,) = golden.leaves("x")
    return _with_gradients(golden, made, x, made(x))


def _config(golden: Golden) -> MetaFormerConfig:
    c = dict(golden.config)
    mixers = [_mixer(m) for m in c.pop("token_mixers")]
    position = c.pop("pos_embed")
    patch = tuple(c.pop("in_patch"))
    # Positions count places of a map; the smallest image that gives so many has this size.
    size: tuple[int, int] = (224, 224)
    if position is not None:
        stride = patch[1] * 2 ** position["before_stage"]
        size = tuple(g * stride for g in position["grid"])
    options = golden_options(mixers)
    made = MetaFormerConfig(
        depths=tuple(c.pop("layers")),
        embed_dims=tuple(c.pop("embed_dims")),
        mlp_ratios=tuple(c.pop("mlp_ratios")),
        num_classes=c.pop("num_classes"),
        mixers=tuple(name for name, _ in mixers),
        mixer_options=options,
        norm=_NORMS[c.pop("norm")],
        positions=None if position is None else position["before_stage"],
        image_size=size,
        patch=patch,
        down=tuple(c.pop("down_patch")),
        downsamples=tuple(c.pop("downsamples")),
        stage_norms=c.pop("fork_feat"),
    )
    assert not c, f"the adapter does not know {sorted(c)}"
    return made


def golden_options(mixers: list[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, options in mixers:
        assert found.setdefault(name, options) == options, "two kinds of one mixer in a model"
    return found


@adapter("metaformer", "model_logits", "poolformer_tiny_features")
def model(golden: Golden) -> dict[str, Tensor]:
    made = MetaFormer(_config(golden)).load_official(golden.weights).eval()
    (x,) = golden.leaves("x")
    out = made(x)
    if isinstance(out, list):
        return {f"out.out{i}": t for i, t in enumerate(out)}
    return _with_gradients(golden, made, x, out)


def _with_gradients(golden: Golden, made: Any, x: Tensor, out: Tensor) -> dict[str, Tensor]:
    results = {"out.out": out}
    if "cot_out" in golden.inputs:
        (out * golden.inputs["cot_out"]).sum().backward()
        results["grad.x"] = x.grad
        results |= {f"grad.w.{n}": p.grad for n, p in made.named_parameters()}
    return results
