"""Golden files of MiniLM."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.softmax import softmax_weights
from manyheads.compress.minilm import (
    QKV,
    Relation,
    attention_transfer_loss,
    capture_qkv,
    minilm_loss,
    value_relation_loss,
)
from manyheads.data.packages import minilm_folder
from manyheads.models.language.bert import BertConfig, BertEncoder
from parity.golden import Golden, adapter

_NAMES = {"1": "query", "2": "key", "3": "value"}


@adapter("minilm", "losses_core")
def losses(golden: Golden) -> dict[str, Tensor]:
    golden.options("batch", "heads", "seq", "d_head_teacher", "d_head_student", "lengths")
    mask = golden.inputs["attention_mask"].bool()
    teacher = QKV(*(golden.inputs[f"{n}_teacher"] for n in "qkv"))
    student = QKV(*golden.leaves("q_student", "k_student", "v_student"))
    transfer = attention_transfer_loss(teacher, student, mask=mask)
    relation = value_relation_loss(teacher, student, mask=mask)
    (transfer + relation).backward()
    weights = softmax_weights(teacher.query, teacher.key, mask=mask)
    return {
        "out.attn_teacher": weights,
        "out.loss": transfer + relation,
        "out.loss_at": transfer,
        "out.loss_vr": relation,
    } | {f"grad.{n}_student": t.grad for n, t in zip("qkv", student, strict=True)}


def _model(golden: Golden, name: str, sizes: dict[str, Any]) -> BertEncoder:
    model = BertEncoder(BertConfig.from_official(sizes | {"add_pooler": False})).eval()
    prefix = f"{name}."
    own = {k.removeprefix(prefix): t for k, t in golden.weights.items() if k.startswith(prefix)}
    return model.load_official(own)


@adapter("minilm", "bert_distill_v1")
def distillation(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    golden.options(
        "teacher", "student", "teacher_layer", "relations", "relation_heads", "lengths", "names"
    )
    teacher, student = (_model(golden, n, c[n]) for n in ("teacher", "student"))
    mask = golden.inputs["attention_mask"].bool()
    with torch.no_grad():
        target = capture_qkv(teacher, golden.inputs, layer=c["teacher_layer"] - 1).qkv
    own = capture_qkv(student, golden.inputs).qkv
    relations = [
        Relation(_NAMES[key[0]], _NAMES[key[2]], weight) for key, weight in c["relations"].items()
    ]

    def loss(*some: Relation) -> Tensor:
        return minilm_loss(
            target, own, mask=mask, relations=some, relation_heads=c["relation_heads"]
        )

    total = loss(*relations)
    total.backward()
    results = {"out.loss": total}
    for key, relation in zip(c["relations"], relations, strict=True):
        results[f"out.relation_{key[0]}{key[2]}"] = loss(relation._replace(weight=1.0))
    # The file names the last layer's projections and the table of positions in short.
    last = f"encoder.layer.{c['student']['num_hidden_layers'] - 1}.attention.self."
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            short = name.removeprefix(last).removeprefix("embeddings.")
            short = short if name.startswith(last) else short.removesuffix(".weight")
            results[f"grad.student.{short}"] = parameter.grad
    return results


@adapter("minilm", "real_teacher_all_minilm_l6_v2")
def real_teacher(golden: Golden) -> dict[str, Tensor]:
    golden.options("sentences", "hidden", "layers", "heads", "head_dim", "ffn", "layer_norm_eps")
    folder = minilm_folder()
    config = BertConfig.from_official(json.loads((folder / "config.json").read_text()))
    model = BertEncoder(config).load_official(folder / "model.safetensors").eval()
    batch = {k: golden.inputs[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        last, output = capture_qkv(model, batch, rest=True)
        third = capture_qkv(model, batch, layer=2).qkv
    features = output.features
    means = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    embedding = F.normalize(means, dim=-1)
    return {
        "out.attention_last": softmax_weights(last.query, last.key, mask=mask),
        "out.value_relation_last": softmax_weights(last.value, last.value, mask=mask),
        "out.last_hidden_state": features,
        "out.sentence_embedding": embedding,
        "out.similarity": embedding @ embedding.mT,
        "out.loss_at_first3layers": attention_transfer_loss(last, third, mask=mask),
        "out.loss_vr_first3layers": value_relation_loss(last, third, mask=mask),
    }
