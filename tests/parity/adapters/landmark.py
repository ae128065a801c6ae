"""Landmark attention: softmax, kernel, memory and both language models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention import LandmarkMemory, grouped_softmax, landmark
from manyheads.attention.landmark import landmark_groups
from manyheads.models.language.landmark import (
    LandmarkGPT,
    LandmarkGPTConfig,
    LandmarkLlama,
    LandmarkLlamaConfig,
)
from parity.golden import Golden, adapter


@adapter("landmark", "grouped_softmax")
def softmax(golden: Golden) -> dict[str, Tensor]:
    golden.options("batch", "heads", "seq", "block")
    marks = golden.inputs["is_landmark"].bool()
    (scores,) = golden.leaves("scores")
    probabilities = grouped_softmax(scores, marks)
    (probabilities * golden.inputs["coef"]).sum().backward()
    assert scores.grad is not None
    batch, heads, queries, _ = scores.shape
    groups = landmark_groups(marks, queries)
    seen = groups.own | groups.gates | groups.ordinary
    return {
        "out.probs": probabilities,
        "out.ignored_mask": ~seen[:, None].expand(batch, heads, -1, -1),
        "out.own_block_mask": groups.own[:, None].expand(batch, heads, -1, -1),
        "grad.scores": scores.grad,
    }


@adapter("landmark", "fused_attention")
def fused(golden: Golden) -> dict[str, Tensor]:
    options = golden.options("batch", "heads", "nq", "nk", "head_dim", block="block_size")
    leaves = golden.leaves("q", "k", "v")
    out = landmark(*leaves, implementation="block", **options)
    grads = torch.autograd.grad((out * golden.inputs["coef"]).sum(), leaves)
    return {"out.out": out} | {f"grad.{n}": g for n, g in zip("qkv", grads, strict=True)}


@adapter("landmark", "retrieval_step")
def retrieval(golden: Golden) -> dict[str, Tensor]:
    options = golden.options(
        "heads", "head_dim", "stored", "start_index", "incomplete", "blocks_seen",
        block="block_size", topk="top_k", memory_blocks="capacity", selection="selection",
    )  # fmt: skip
    memory = LandmarkMemory(rotary_interleaved=True, official_start=True, **options)
    for i in range(len(golden.config["stored"])):
        memory.append(golden.inputs[f"key_{i}"], golden.inputs[f"value_{i}"])
    assert memory.start == golden.config["start_index"]
    assert memory.seen == golden.config["blocks_seen"]
    assert memory.tail_length == golden.config["incomplete"]
    query = golden.inputs["query"]
    found = memory.retrieve(query)
    queries, keys = memory.turn_chunk(query, query[:, :, :0])
    assert memory.tail is not None
    batch, _, length, dim = query.shape
    tail = memory.tail[1][:, :, None].expand(-1, -1, length, -1, -1)
    values = found.values.expand(-1, -1, length, -1, -1, -1).flatten(3, 4)
    marks = torch.zeros(memory.top_k, memory.block_size, dtype=torch.bool)
    marks[:, -1] = True
    marks = torch.cat((marks.flatten(), torch.zeros(memory.tail_length, dtype=torch.bool)))
    return {
        "out.query_rotated": queries,
        "out.prefix_scores": torch.cat(
            (found.scores.flatten(3), queries @ keys.mT * dim**-0.5), -1
        ),
        "out.prefix_values": torch.cat((values, tail), 3),
        "out.prefix_is_landmark": marks.expand(batch, -1),
    }


@adapter("landmark", "tiny_lm")
def language_model(golden: Golden) -> dict[str, Tensor]:
    model = LandmarkGPT(LandmarkGPTConfig.from_official(golden.config))
    model.load_official(golden.weights).eval()
    logits = model(golden.inputs["ids"])
    results = {"out.logits": logits}
    if "targets" in golden.inputs:
        targets = golden.inputs["targets"].flatten()
        results["out.loss"] = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1)
    return results


@adapter("landmark", "cached_inference_incomplete_block")
def cached_inference(golden: Golden) -> dict[str, Tensor]:
    of_run = ("chunk", "chunks", "block", "last_chunk")
    c = golden.config
    config = LandmarkGPTConfig.from_official({k: v for k, v in c.items() if k not in of_run})
    assert config.block_size == c["block"]
    model = LandmarkGPT(config).load_official(golden.weights).eval()
    ids = golden.inputs["ids"]
    state = model.init_state(
        len(ids),
        top_k=c["cache_topk"],
        capacity=c["mem_cache_size"],
        selection=c["cache_selection_method"],
        official_start=True,
    )
    parts = []
    for chunk in ids.split(c["chunk"], 1):
        logits, state = model.update(chunk, state, chunk_length=ids.shape[1] * 2)
        parts.append(logits)
    return {"out.logits": torch.cat(parts, 1)}


def _llama(golden: Golden, *of_run: str) -> LandmarkLlama:
    official = {k: v for k, v in golden.config.items() if k not in of_run}
    model = LandmarkLlama(LandmarkLlamaConfig.from_official(official))
    return model.load_official(golden.weights).eval()


@adapter("landmark", "llama_full")
def llama(golden: Golden) -> dict[str, Tensor]:
    return {"out.logits": _llama(golden)(golden.inputs["ids"])}


@adapter("landmark", "llama_cache_decode")
def llama_with_memory(golden: Golden) -> dict[str, Tensor]:
    model = _llama(golden, "cache_top_k", "offload", "window")
    ids, c = golden.inputs["ids"], golden.config
    selection = "max_over_tokens" if c["offload"] else "per_token_and_head"
    state = model.init_state(len(ids), top_k=c["cache_top_k"], selection=selection)
    parts = []
    for chunk in ids.split(golden.inputs["chunk_lengths"].tolist(), 1):
        logits, state = model.update(chunk, state, chunk_length=c["window"], with_landmarks=True)
        parts.append(logits)
    return {"out.logits": torch.cat(parts, 1)}
