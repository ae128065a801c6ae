"""Golden files of VOLO."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from manyheads.attention.grid.outlook import OutlookAttention
from manyheads.models.vision.volo import (
    VOLO,
    VOLOConfig,
    mixed_targets,
    soft_target_loss,
    token_label_loss,
    token_targets,
)
from manyheads.models.vision.volo.blocks import Block, ClassBlock
from manyheads.models.vision.volo.weights import resize_grid
from parity.golden import Golden, adapter

_OUTLOOK = {"num_heads", "kernel_size", "padding", "stride", "qkv_bias"}


def _outlook(c: dict[str, Any]) -> OutlookAttention:
    options = {k: c.pop(k) for k in _OUTLOOK & c.keys()}
    return OutlookAttention(c.pop("dim"), scale=c.pop("qk_scale", None), **options)


@adapter("volo", "module:OutlookAttention", "module:Outlooker", "module:ClassBlock")
def block(golden: Golden) -> dict[str, Tensor]:
    c = dict(golden.config)
    kind = c.pop("cls")
    made: nn.Module
    if kind == "OutlookAttention":
        made = _outlook(c)
    elif kind == "Outlooker":
        dim, ratio = c["dim"], c.pop("mlp_ratio")
        made = Block(dim, _outlook(c), mlp_ratio=ratio)
    else:
        options = {k: c.pop(k) for k in ("num_heads", "mlp_ratio", "qkv_bias") if k in c}
        made = ClassBlock(c.pop("dim"), **options)
    assert not c, f"the adapter does not know {sorted(c)}"
    made.load_state_dict(golden.weights)
    (x,) = golden.leaves("x")
    return _with_gradients(golden, made.eval(), x, {"out": made(x)})


@adapter("volo", "model_logits")
def logits(golden: Golden) -> dict[str, Tensor]:
    made = VOLO(VOLOConfig.from_official(golden.config)).load_official(golden.weights).eval()
    (x,) = golden.leaves("x")
    return _with_gradients(golden, made, x, {"out": made(x)})


@adapter("volo", "volo_tiny_train_mixtoken")
def training(golden: Golden) -> dict[str, Tensor]:
    c = dict(golden.config)
    box = c.pop("box")
    made = VOLO(VOLOConfig.from_official(c)).load_official(golden.weights).train()
    (x,) = golden.leaves("x")
    out = made.forward_train(x, box=box)
    results = {"cls": out.logits, "aux": out.token_logits}
    return _with_gradients(golden, made, x, results) | {"out.bbox": x.new_tensor(out.box).long()}


@adapter("volo", "pos_embed_resize")
def positions(golden: Golden) -> dict[str, Tensor]:
    (pos,) = golden.leaves("pos")
    return {f"out.{n}": resize_grid(pos, tuple(t.shape[1:3])) for n, t in golden.outputs.items()}


@adapter("volo", "token_label_losses")
def losses(golden: Golden) -> dict[str, Tensor]:
    weights = golden.options("boxes", dense_weight="token_weight", cls_weight="class_weight")
    cls, aux = golden.leaves("cls", "aux")
    results = {}
    for name in golden.outputs:
        if name == "softtarget":
            results[name] = soft_target_loss(cls, golden.inputs["t2"])
            continue
        loss, box, target = name.split("_")
        results[name] = token_label_loss(
            cls,
            aux,
            golden.inputs[target],
            tuple(golden.config["boxes"][box]),
            ground_truth=loss == "tokenlabelgt",
            **weights,
        )
    sum(t * golden.inputs[f"cot_{n}"] for n, t in results.items()).backward()
    found = {f"out.{n}": t for n, t in results.items()}
    return found | {"grad.cls": cls.grad, "grad.aux": aux.grad}


@adapter("volo", "token_label_targets")
def targets(golden: Golden) -> dict[str, Tensor]:
    c, results = golden.config, {}
    for name, options in c["outputs"].items():
        size, stored = options["label_size"], golden.inputs["label"]
        if "lam" in options:
            made = mixed_targets(
                stored, c["num_classes"], size, kept=options["lam"], smoothing=options["smoothing"]
            )
        else:
            on, off = options["on_value"], options["off_value"]
            made = token_targets(stored, c["num_classes"], size, on=on, off=off)
        results[f"out.{name}"] = made
    return results


def _with_gradients(
    golden: Golden, made: nn.Module, x: Tensor, outputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    results = {f"out.{n}": t for n, t in outputs.items()}
    if any(n.startswith("cot_") for n in golden.inputs):
        sum((t * golden.inputs[f"cot_{n}"]).sum() for n, t in outputs.items()).backward()
        results["grad.x"] = x.grad
        results |= {f"grad.w.{n}": p.grad for n, p in made.named_parameters()}
    return results
