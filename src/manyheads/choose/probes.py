"""Small tasks that tell mechanisms apart: recall, copying, ListOps.

B batch, N length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.choose.contest import EMBED_DIM, NUM_HEADS, Contest, model_layers, small_lm
from manyheads.choose.race import Figure
from manyheads.choose.workload import Workload
from manyheads.data import TaskBatch, TaskBatches, TaskConfig, get_task
from manyheads.data.synthetic import CopyConfig, ListOpsConfig, RecallConfig
from manyheads.models.language.mixer_encoder import MixerEncoder, MixerEncoderConfig

__all__ = ["PROBE_CONFIGS", "build_probe"]

# Small, so that a budget of minutes is many steps; what no candidate learns decides nothing.
PROBE_CONFIGS: dict[str, TaskConfig] = {
    "recall": RecallConfig(vocab_size=16, length=24, pairs=4, filler="zero", power=0.5),
    "copy": CopyConfig(vocab_size=16, symbols=16),
    "listops": ListOpsConfig(max_depth=3, max_args=4, min_length=8, max_length=64),
}
_BATCH = 32
_HELD_OUT = 256


def build_probe(name: str, workload: Workload) -> Contest:
    """Return the contest of a probe; held-out samples occur in no training batch.

    Raises:
        ValueError: no such probe.
    """
    task = get_task(name)
    config = PROBE_CONFIGS[name]
    train = TaskBatches(task, config, batch_size=_BATCH, seed=workload.seed, fold="train")
    test = [
        task.batch(config, seed=workload.seed, indices=range(a, a + _BATCH), fold="held_out")
        for a in range(0, _HELD_OUT, _BATCH)
    ]
    classify = task.kind == "label"

    def build(mixer: str) -> nn.Module:
        if classify:
            return _classifier(workload, mixer, config)
        vocab, length = config.num_tokens, config.longest
        return small_lm(workload, mixer, vocab_size=vocab, length=length)

    def logits(model: nn.Module, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        whole = bool(batch.mask.all())
        out = model(batch.inputs, mask=None if whole else batch.mask)
        return out if classify else out.flatten(0, 1), batch.targets.flatten()

    def loss(model: nn.Module, step: int) -> Tensor:
        scores, targets = logits(model, train.batch(step))
        return F.cross_entropy(scores, targets)

    @torch.no_grad()
    def evaluate(model: nn.Module) -> Figure:
        right = scored = 0
        for batch in test:
            scores, targets = logits(model, batch)
            real = targets != -100
            right += int((scores.argmax(-1) == targets)[real].sum())
            scored += int(real.sum())
        share = right / scored
        return Figure(share, 1.96 * math.sqrt(max(share * (1 - share), 1 / scored) / scored))

    probe = train.batch(0)
    answers = torch.cat([b.targets[b.targets != -100].flatten() for b in test])
    return Contest(
        task=name,
        metric="accuracy",
        build=build,
        loss=loss,
        evaluate=evaluate,
        tokens_a_step=probe.inputs.numel(),
        chance=float(answers.bincount().max() / len(answers)),
        length=config.longest,
        details=config.to_dict() | {"embed_dim": EMBED_DIM, "num_heads": NUM_HEADS,
                                    "layers": model_layers(workload)},
    )  # fmt: skip


def _classifier(workload: Workload, mixer: str, config: TaskConfig) -> MixerEncoder:
    return MixerEncoder(
        MixerEncoderConfig(
            num_classes=config.num_outputs,
            vocab_size=config.num_tokens,
            embed_dim=EMBED_DIM,
            num_heads=NUM_HEADS,
            num_layers=model_layers(workload),
            mixers=mixer,
            max_length=config.longest,
        )
    )
