"""Golden files of TransNeXt."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from manyheads.attention.aggregated import AggregatedAttention, LengthScaledAttention
from manyheads.attention.aggregated.places import axis_table, log_coordinates, neighbours
from manyheads.models.vision.transnext import ConvGLU, TransNeXt, TransNeXtConfig
from parity.golden import Golden, adapter


def _map(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def _pair(value: Any) -> tuple[int, int] | None:
    return None if value is None else tuple(value)


def _with_gradients(golden: Golden, made: Any, x: Tensor, out: Tensor) -> dict[str, Tensor]:
    results = {"out.out": out}
    if "cot_out" in golden.inputs:
        (out * golden.inputs["cot_out"]).sum().backward()
        results["grad.x"] = x.grad
        results |= {f"grad.w.{n}": p.grad for n, p in made.named_parameters()}
    return results


@adapter("transnext", "module:AggregatedAttention", "module:Attention")
def attention(golden: Golden) -> dict[str, Tensor]:
    c = dict(golden.config)
    classes = {"AggregatedAttention": AggregatedAttention, "Attention": LengthScaledAttention}
    made = classes[c.pop("cls")](
        c.pop("dim"),
        num_heads=c.pop("num_heads"),
        qkv_bias=c.pop("qkv_bias"),
        pretrain_grid=_pair(c.pop("pretrain_size")),
        **{k: c.pop(k) for k in ("window_size", "sr_ratio", "fixed_pool_size") if k in c},
    ).eval()
    size = tuple(c.pop("input_resolution"))
    assert not c, f"the adapter does not know {sorted(c)}"
    made.load_state_dict(golden.weights)
    (x,) = golden.leaves("x")
    return _with_gradients(golden, made, x, _tokens(made(_map(x, size))))


@adapter("transnext", "module:ConvolutionalGLU")
def conv_glu(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    made = ConvGLU(c["in_features"], c["hidden_features"]).eval()
    made.load_state_dict(
        {k.replace("dwconv.dwconv", "dwconv"): t for k, t in golden.weights.items()}
    )
    rows, columns = map(int, re.search(r"m\(x, ?(\d+), ?(\d+)\)", golden.meta["call"]).groups())
    (x,) = golden.leaves("x")
    return _with_gradients(golden, made, x, _tokens(made(_map(x, (rows, columns)))))


@adapter("transnext", "log_cpb_coordinates")
def coordinates(golden: Golden) -> dict[str, Tensor]:
    results = {}
    for name, text in golden.config.items():
        q, k, *start = [tuple(map(int, s.split("x"))) for s in re.findall(r"\d+x\d+", text)]
        start = start[0] if start else q
        lines, pairs = [], []
        for axis in (0, 1):
            distances, index = axis_table(q[axis], k[axis])
            used, index = index.unique(return_inverse=True)
            lines.append(log_coordinates(distances[used], start[axis]))
            pairs.append(index.view(k[axis], q[axis]))
        table = torch.cartesian_prod(*lines)
        # Queries outside, keys inside; each row by row.
        index = pairs[0].T[:, None, :, None] * len(lines[1]) + pairs[1].T[None, :, None, :]
        index = index.reshape(q[0] * q[1], -1)
        results |= {
            f"out.table_{name}": table,
            f"out.index_{name}": index.flatten(),
            f"out.expanded_{name}": table[index],
        }
    return results


@adapter("transnext", "window_lengths_and_mask")
def window(golden: Golden) -> dict[str, Tensor]:
    results = {}
    for name, text in golden.config.items():
        height, width, size = map(int, re.fullmatch(r"(\d+)x(\d+) window (\d+)", text).groups())
        inside, outside = neighbours(height, width, size)
        results |= {f"out.len_{name}": inside[:, None], f"out.mask_{name}": outside.T}
    return results


def _model(golden: Golden, **changes: Any) -> tuple[TransNeXt, Tensor]:
    c = dict(golden.config)
    has_head = "head.weight" in golden.weights
    config = TransNeXtConfig(
        image_size=c.pop("img_size"),
        pretrain_size=c.pop("pretrain_size"),
        window_sizes=tuple(w or 3 for w in c.pop("window_size")),
        num_classes=c.pop("num_classes", 0) if has_head else 0,
        **{k: tuple(c.pop(k)) for k in ("embed_dims", "num_heads", "mlp_ratios", "depths")},
        **{
            k: c.pop(k) for k in ("patch_size", "qkv_bias", "norm_eps", "fixed_pool_size") if k in c
        },
        sr_ratios=tuple(c.pop("sr_ratios")),
        **changes,
    )
    c.pop("is_extrapolation", None)
    assert not c, f"the adapter does not know {sorted(c)}"
    made = TransNeXt(config).load_official(golden.weights).eval()
    assert made.to_official().keys() == golden.weights.keys()
    return made, golden.inputs["x"]


@adapter("transnext", "model_logits")
def logits(golden: Golden) -> dict[str, Tensor]:
    made, x = _model(golden)
    return {"out.out": made(x)}


@adapter("transnext", "dense_extrapolation", "dense_interpolation")
def dense(golden: Golden) -> dict[str, Tensor]:
    mode = "extrapolation" if golden.config["is_extrapolation"] else "interpolation"
    made, x = _model(golden, positions=mode)
    maps = made.forward_intermediates(x, intermediates_only=True)
    return {f"out.out{i}": m for i, m in enumerate(maps)}
