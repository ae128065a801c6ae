"""Distil a BERT by MiniLM's losses (2002.10957) and, beside the paper, its sentence embeddings.

MiniLM's loss makes the student's last attention like its teacher's. It does not say where the
embedding of a sentence lies; the second loss does: 1 - cosine of the mean-pooled embedding with
the teacher's, projected onto as many directions as the student has. B batch, N length.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyheads.compress.minilm.files import (
    load_bert,
    needs_assistant,
    save_bert,
    student_config,
)
from manyheads.compress.minilm.start import collect_streams, start_from_teacher, stream_basis
from manyheads.data.lee import LeeDocuments, load_lee
from manyheads.data.packages import minilm_folder
from manyheads.data.seeding import generator
from manyheads.data.sentences import load_sentences
from manyheads.errors import require_extra
from manyheads.models.language.bert import BertConfig, BertEncoder
from manyheads.train.distil_data import SentenceBatches, embed, encode, pad, read_tokenizer
from manyheads.train.distil_losses import (
    cosine,
    freeze_unreached,
    loss_of,
    relation_loss_of,
    stream_batches,
    teacher_outputs,
)
from manyheads.train.distil_options import DistilOptions
from manyheads.train.files import write_json
from manyheads.train.launch import launch
from manyheads.train.loop import (
    evaluating,
    fit,
    load_kept,
    open_folder,
    part_size,
    seed_process,
    sum_over_processes,
)
from manyheads.train.report import results
from manyheads.train.stop import StopRequest

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["DistilOptions", "load_run", "run", "train"]

_PACKAGED = "all-minilm-l6-v2"


class Prepared(NamedTuple):
    """What is read before any work."""

    teacher: Path
    config: BertConfig
    rows: list[np.ndarray]
    valid: list[np.ndarray]
    description: str
    sha256: str
    lee: LeeDocuments | None


def run(options: DistilOptions) -> int:
    """Do ``manyheads train distil``; returns the exit code."""
    return launch(options, prepare, train)


def load_run(folder: str | Path) -> BertEncoder:
    """Return the student that a run kept, in eval mode."""
    return load_bert(folder)


def prepare(options: DistilOptions) -> Prepared:
    """Read teacher, text and tokens, so that their errors come before any work."""
    require_extra("tokenizers", "train", "train distil")
    folder = minilm_folder() if options.teacher == _PACKAGED else Path(options.teacher)
    teacher, tokenizer = load_bert(folder), read_tokenizer(folder)
    config = student_config(
        teacher.config,
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        num_heads=options.num_heads,
        intermediate_size=options.intermediate_size,
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.dropout,
        add_pooler=False,
    )
    if options.embedding_weight and config.hidden_size > teacher.config.hidden_size:
        raise ValueError(
            f"hidden_size {config.hidden_size} exceeds the teacher's {teacher.config.hidden_size}: "
            "give embedding_weight 0 and relation_share 1, or less width"
        )
    check_student(options, teacher, config)
    sentences = load_sentences(
        options.data, vocabulary=tokenizer.get_vocab(), bags=options.bags, seed=options.seed
    )
    order = generator(options.seed, 0).permutation(len(sentences.texts))[: options.max_sentences]
    rows = encode(tokenizer, tuple(sentences.texts[i] for i in order), options.length)
    held = max(1, round(options.valid_fraction * len(rows)))
    if held >= len(rows):
        raise ValueError(f"data has {len(rows)} sentences: give more, or less valid_fraction")
    lee = load_lee() if options.lee else None
    return Prepared(
        folder, config, rows[held:], rows[:held], sentences.description, sentences.sha256, lee
    )


def check_student(options: DistilOptions, teacher: BertEncoder, config: BertConfig) -> None:
    """Try the first step on two tokens.

    Raises:
        ValueError: heads, relation heads, layers or sizes that do not fit the teacher.
    """
    with torch.random.fork_rng():
        student = BertEncoder(config)
        tokens = torch.zeros(1, 2, dtype=torch.long)
        if options.relation_steps():
            relation_loss_of(options, teacher, student(tokens, output="qkv")[1:], tokens, None)
        if options.start == "teacher":
            streams = collect_streams(
                teacher, [(tokens, torch.ones_like(tokens, dtype=torch.bool))]
            )
            start_from_teacher(student, teacher, streams, stream_basis(streams, config.hidden_size))


def train(
    fabric: Fabric, options: DistilOptions, prepared: Prepared, stop: StopRequest
) -> dict[str, Any]:
    """Train in this process, alone or beside others; returns the results."""
    with open_folder(fabric, options, {"sha256": prepared.sha256}) as folder:
        # Set up.
        teacher = load_bert(prepared.teacher).requires_grad_(False)
        fabric.to_device(teacher)
        kept = teacher_outputs(
            fabric,
            options,
            folder.path,
            prepared.teacher,
            teacher,
            {"train": prepared.rows, "valid": prepared.valid},
            stop,
        )
        torch.manual_seed(options.seed)
        student = BertEncoder(prepared.config)
        if options.start == "teacher":
            streams = collect_streams(teacher.cpu(), stream_batches(prepared.rows))
            start_from_teacher(student, teacher, streams, kept["basis"])
            fabric.to_device(teacher)
        freeze_unreached(options, student)
        seed_process(fabric, options.seed)
        batches = SentenceBatches(
            prepared.rows,
            kept["train"],
            batch_size=part_size(fabric, options),
            seed=options.seed,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        )

        # Fit.
        compute = loss_of(options, teacher)
        figure = "valid_cosine" if options.embedding_weight else "valid_relation_loss"

        def evaluate() -> dict[str, float]:
            return {figure: held_out(fabric, options, student, teacher, prepared, kept, stop)}

        at = fit(
            fabric,
            options,
            folder,
            stop,
            student,
            batches,
            loss=compute,
            evaluate=evaluate,
            figures=(figure,),
            unit=("sentences", options.batch_size),
            sign=1 if options.embedding_weight else -1,
        )

        # Evaluate the weights that were best on the way.
        load_kept(folder, student)
        student.to(fabric.device).eval()
        found = results(
            options,
            title=f"distil {options.teacher} to {options.num_layers} layers of "
            f"{options.hidden_size}, {student.num_parameters():,} parameters, on "
            f"{len(prepared.rows):,} sentences ({prepared.description})",
            figures={
                figure: at.best,
                "best_step": at.best_step,
                **lee_figures(options, teacher, student, prepared),
                "parameters": student.num_parameters(),
                "teacher_parameters": teacher.num_parameters(),
                "epochs": options.steps * options.batch_size / len(prepared.rows),
                "seconds": at.seconds,
            },
            hint=hint(options, teacher.config, prepared.config),
            sha256=prepared.sha256,
            model=student.config.to_dict(),
        )
        if fabric.is_global_zero:
            save_bert(student, folder.path / "student", tokenizer=prepared.teacher)
            write_json(folder.results, found)
        return found


def held_out(
    fabric: Fabric,
    options: DistilOptions,
    student: BertEncoder,
    teacher: BertEncoder,
    prepared: Prepared,
    kept: dict[str, Tensor],
    stop: StopRequest,
) -> float:
    """Return the mean over held-out sentences of the cosine, or of MiniLM's loss alone."""
    order = sorted(range(len(prepared.valid)), key=lambda i: len(prepared.valid[i]))
    own = order[fabric.global_rank :: fabric.world_size]
    total = 0.0
    size = part_size(fabric, options)
    with evaluating(fabric, student):
        for start in range(0, len(own), size):
            stop.check()
            some = own[start : start + size]
            tokens, mask, target = fabric.to_device(
                (*pad([prepared.valid[i] for i in some]), kept["valid"][some])
            )
            if options.embedding_weight:
                features = student(tokens, mask=mask).features
                total += float(cosine(features, mask, target).sum())
            else:
                _, *qkv = student(tokens, mask=mask, output="qkv")
                total += len(some) * float(relation_loss_of(options, teacher, qkv, tokens, mask))
    total, count = sum_over_processes(fabric, total, len(own))
    return total / count


def lee_figures(
    options: DistilOptions, teacher: BertEncoder, student: BertEncoder, prepared: Prepared
) -> dict[str, float]:
    """Return Spearman's correlations with people on the Lee documents, if they are asked for."""
    if prepared.lee is None:
        return {}
    length = min(m.config.max_position_embeddings for m in (teacher, student))
    rows = encode(read_tokenizer(prepared.teacher), prepared.lee.documents, length)
    theirs, own = (prepared.lee.correlation(embed(m, rows)) for m in (teacher, student))
    return {"teacher_spearman": theirs, "spearman": own, "spearman_kept": own / theirs}


def hint(options: DistilOptions, teacher: BertConfig, student: BertConfig) -> str:
    """Return what to try next: the paper puts an assistant before a student as small as this."""
    if not needs_assistant(teacher, student) or options.start == "teacher":
        return ""
    return (
        f"manyheads train distil --num-layers {teacher.num_hidden_layers} --hidden-size "
        f"{student.hidden_size} --out runs/assistant, then --teacher runs/assistant"
    )
