"""SLA: the released module, its first release, and the paper's three classes."""

from __future__ import annotations

from torch import Tensor

from manyheads.attention import SparseLinearAttention
from parity.golden import Golden, adapter

_VARIANTS = {"main": "main", "SLA-1": "sla1", "paper": "paper"}


@adapter("sla", "main_core", "sla1_core_oddlen", "paper_three_class")
def attention(golden: Golden) -> dict[str, Tensor]:
    options = golden.options(
        "B", "H", "L", "n_critical", "n_negligible", "smooth_k", "variant",
        head_dim="head_dim", topk="topk", k_h="topk", k_l="negligible",
        feature_map="feature_map", BLKQ="block_q", BLKK="block_k",
    )  # fmt: skip
    module = SparseLinearAttention(**options, variant=_VARIANTS[golden.config["variant"]])
    module.load_official(
        {"proj_l.bias": module.proj_l.bias.detach()} | golden.weights  # the paper's has none
    )
    q, k, v = leaves = golden.leaves("q", "k", "v")
    parts, out = module.parts(q, k, v), module(q, k, v)
    results = {
        "out.o": out,
        "out.o_sparse": parts.o_sparse,
        "out.o_linear": parts.o_linear,
        "out.block_map": parts.block_map,
    }
    row = parts.block_map[0, 0, 0]
    for name, kind in (("n_critical", 1), ("n_negligible", -1)):
        if name in golden.config:
            counted = int((row == kind).sum())
            assert counted == max(golden.config[name], int(kind == 1)), name
    if "grad_out" not in golden.inputs:
        return results
    out.backward(golden.inputs["grad_out"])
    grads = dict(zip("qkv", leaves, strict=True)) | dict(module.named_parameters())
    return results | {f"grad.{n}": t.grad for n, t in grads.items() if t.grad is not None}
