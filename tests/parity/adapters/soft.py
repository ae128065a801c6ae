"""Golden files of SOFT."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from manyheads.attention.soft import (
    SoftAttention,
    gaussian_kernel,
    newton_inverse,
    newton_inverse_normalised,
    squared_distances,
)
from manyheads.models.vision.soft import SOFT, SoftBlock, SOFTConfig
from parity.golden import Golden, adapter


def _backward(golden: Golden, results: dict[str, Tensor]) -> None:
    """Sum every output times its cotangent and run backward."""
    terms = [
        (results[f"out.{name[4:]}"] * cot).sum()
        for name, cot in golden.inputs.items()
        if name.startswith("cot_")
    ]
    if terms:
        sum(terms[1:], terms[0]).backward()


@adapter("soft", "gaussian_kernel")
def kernel(golden: Golden) -> dict[str, Tensor]:
    q, k = golden.leaves("q", "k")
    results = {"out.sqdist": squared_distances(q, k), "out.kernel": gaussian_kernel(q, k)}
    _backward(golden, results)
    return results | {"grad.q": q.grad, "grad.k": k.grad}


@adapter("soft", "newton_inverse", "newton_inverse_illconditioned")
def newton(golden: Golden) -> dict[str, Tensor]:
    (mat,) = golden.leaves("mat")
    steps = golden.options(iters="iterations")["iterations"]
    results = {f"out.inv{n}": newton_inverse(mat, iterations=n) for n in steps}
    _backward(golden, results)
    return results | {"grad.mat": mat.grad}


@adapter("soft", "newton_inverse_norm")
def newton_norm(golden: Golden) -> dict[str, Tensor]:
    (mat,) = golden.leaves("mat")
    n = golden.options(iters="iterations")["iterations"]
    results = {
        f"out.inv{n}": newton_inverse_normalised(mat, iterations=n, shared_step=True),
        f"out.inv{n}_first_only": newton_inverse_normalised(
            mat[:1], iterations=n, shared_step=True
        ),
    }
    _backward(golden, results)
    return results | {"grad.mat": mat.grad}


def _layer_options(golden: Golden) -> dict[str, Any]:
    c = dict(golden.config)
    name = c.pop("cls")
    assert c.pop("kernel_method", "torch") in ("torch", "cuda")
    options = {
        "dim": c.pop("dim"),
        "num_heads": c.pop("num_heads"),
        "ratio": c.pop("ratio"),
        "conv_size": c.pop("conv_size"),
        "iterations": c.pop("max_iter", 20),
        "normalise": "Norm" in name,
        "shared_step": True,
    }
    assert not c, f"the adapter does not know {sorted(c)}"
    return options


def _size(golden: Golden) -> tuple[int, int]:
    """Rows and columns stand in the call alone: "8, 6", "9x7" or "x,6,5"."""
    places = golden.inputs["x"].shape[1]
    found = re.findall(r"(\d+)\s*[x,]\s*(\d+)", golden.meta["call"])
    return next((int(h), int(w)) for h, w in found if int(h) * int(w) == places)


def _run(golden: Golden, made: nn.Module) -> dict[str, Tensor]:
    (x,) = golden.leaves("x")
    out = made(x.unflatten(1, _size(golden))).flatten(1, 2)
    results = {"out.out": out}
    _backward(golden, results)
    if x.grad is not None:
        results["grad.x"] = x.grad
    return results


@adapter("soft", "module:SoftmaxFreeAttention", "module:SoftmaxFreeNormAttention")
def attention(golden: Golden) -> dict[str, Tensor]:
    made = SoftAttention(**_layer_options(golden)).load_official(golden.weights).eval()
    results = _run(golden, made)
    gradients = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    return results | {f"grad.w.{n}": g for n, g in made.key_map().to_official(gradients).items()}


@adapter("soft", "module:SoftmaxFreeTransformerBlock", "module:SoftmaxFreeNormTransformerBlock")
def block(golden: Golden) -> dict[str, Tensor]:
    options = _layer_options(golden)
    dim = options["dim"]
    made = SoftBlock(SoftAttention(**options), dim)
    weights = {k.removeprefix("att."): t for k, t in golden.weights.items()}
    mha = {k[4:]: t for k, t in weights.items() if k.startswith("mha.")}
    made.attention.load_official(mha)
    names = {"ff1": "fc1", "ff2": "fc2", "norm1": "norm1", "norm2": "norm2"}
    rest = {k: t for k, t in weights.items() if not k.startswith("mha.")}
    ours = {f"{names[k.split('.')[0]]}.{k.split('.')[1]}": t for k, t in rest.items()}
    ours |= {f"attention.{k}": t for k, t in made.attention.state_dict().items()}
    made.load_state_dict(ours)
    return _run(golden, made.eval())


@adapter("soft", "model_logits")
def model(golden: Golden) -> dict[str, Tensor]:
    c = dict(golden.config)
    assert (c.pop("patch_size"), c.pop("qkv_bias"), c.pop("norm_eps_stage4")) == (4, True, 1e-6)
    c.pop("kernel_method", None)
    config = SOFTConfig(
        depths=tuple(c.pop("depths")),
        embed_dims=tuple(c.pop("embed_dims")),
        num_heads=tuple(c.pop("num_heads")),
        # The official code reads the ratio of stage 4 alone.
        mlp_ratios=(4, 4, 4, c.pop("mlp_ratios")[3]),
        ratios=tuple(c.pop("sr_ratios")[:3]),
        iterations=c.pop("newton_max_iter"),
        image_size=c.pop("img_size"),
        num_classes=c.pop("num_classes"),
        normalise="norm" in golden.meta["case"],
        shared_step=True,
    )
    assert not c, f"the adapter does not know {sorted(c)}"
    made = SOFT(config).load_official(golden.weights).eval()
    (x,) = golden.leaves("x")
    results = {"out.out": made(x)}
    _backward(golden, results)
    if x.grad is not None:
        results["grad.x"] = x.grad
    return results
