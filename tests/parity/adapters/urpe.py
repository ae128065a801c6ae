"""URPE attention, its buckets and its encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention import URPEAttention, URPEConfig
from manyheads.layers.relative import RelativeTable, relative_position_bucket
from manyheads.models.language.urpe import URPEEncoder, URPEEncoderConfig
from parity.golden import Golden, adapter


@adapter("urpe", "attention")
def attention(golden: Golden) -> dict[str, Tensor]:
    options = golden.options("batch", "seq", "rpe", dim="embed_dim", heads="num_heads")
    tables = {n: golden.inputs.get(f"{n}_table") for n in "bc"}
    assert (tables["b"] is not None) == golden.config["rpe"]
    longest = max(t.shape[0] for t in tables.values() if t is not None)
    kinds = {
        n: "none" if tables[t] is None else "unique"
        for n, t in (("bias", "b"), ("multiplier", "c"))
    }
    module = URPEAttention(
        URPEConfig(
            **options, **kinds, is_causal=False, max_length=(longest + 1) // 2, count_padding=True
        )
    ).eval()
    official = {"rp_bias.weight": tables["b"], "ur_rp_bias.weight": tables["c"]}
    module.load_official(golden.weights | {k: t for k, t in official.items() if t is not None})
    padded = golden.inputs.get("key_padding_mask")
    (x,) = golden.leaves("x")
    y = module(x, mask=None if padded is None else ~padded.bool())
    y.sum().backward()
    assert x.grad is not None
    results = {"out.y": y, "grad.x": x.grad}
    for name, table in (("b", module.bias), ("c", module.multiplier)):
        if table is not None and table.weight.grad is not None:
            results[f"grad.{name}_table"] = table.weight.grad
    weights = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return results | {
        f"grad.{part}{n}": g for n, g in weights.items() if "proj" in n for part in ("", "w.")
    }


@adapter("urpe", "buckets")
def buckets(golden: Golden) -> dict[str, Tensor]:
    golden.options("num_buckets", "max_distance", "length")
    sizes = golden.config["num_buckets"], golden.config["max_distance"]
    places = torch.arange(golden.config["length"])
    table = RelativeTable(1, len(places), buckets=sizes)
    return {
        "out.bucket_signed": relative_position_bucket(
            golden.inputs["relative_position"], num_buckets=sizes[0], max_distance=sizes[1]
        ),
        "out.row": table.rows(places - places[:, None]),
    }


@adapter("urpe", "tiny_encoder")
def encoder(golden: Golden) -> dict[str, Tensor]:
    config = URPEEncoderConfig.from_official(golden.config)
    shared = [
        golden.weights[f"encoder.{n}.weight"] for n in ("sentence_encoder.embed_tokens", "lm_head")
    ]
    if not torch.equal(*shared):
        config = config.replace(tie_embeddings=False)
    model = URPEEncoder(config).load_official(golden.weights).eval()
    return {"out.logits": model(golden.inputs["tokens"])}
