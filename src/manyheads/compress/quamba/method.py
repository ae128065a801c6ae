"""Quamba: static 8-bit weights and activations for Mamba. Lossy, needs no training.

"Quamba: A Post-Training Quantization Recipe for Selective State Space Models" (arXiv 2410.13229).
A calibration sets one scale for each activation; the scan's input is clipped at a high percentile,
its output is rotated by a Hadamard matrix whose inverse is folded into the next matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from manyheads.compress.procedure import Batch, Plan, Procedure
from manyheads.compress.quamba.block import Int8Mamba
from manyheads.compress.quamba.calibrate import mamba_blocks, observe
from manyheads.compress.quamba.report import block_report, linear_bytes
from manyheads.compress.quamba.simulate import SimulatedMamba
from manyheads.compress.quamba.sites import SITES
from manyheads.config import Config
from manyheads.errors import unknown_name

__all__ = ["Quamba", "QuambaConfig"]

_MODES: dict[str, type[Int8Mamba] | type[SimulatedMamba]] = {
    "int8": Int8Mamba,
    "simulate": SimulatedMamba,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class QuambaConfig(Config):
    """Options of Quamba.

    Attributes:
        percentile: quantile of the scan's input that sets its scale (none: its largest value);
            models with smaller outliers take 0.9995
        hadamard: rotate the scan's output before it is quantised
        mode: "int8" (weights held as int8, integer kernels) or "simulate" (in float, to compare)
        report_batches: batches of the calibration whose errors are measured for the report
    """

    percentile: float | None = 0.99999
    hadamard: bool = True
    mode: str = "int8"
    report_batches: int = 2

    def __post_init__(self) -> None:
        if self.percentile is not None and not 0 < self.percentile <= 1:
            raise ValueError(f"percentile {self.percentile} must lie in (0, 1], or be None")
        if self.mode not in _MODES:
            raise unknown_name("mode", self.mode, _MODES)
        if self.report_batches < 0:
            raise ValueError(f"report_batches {self.report_batches} must be 0 or more")


class Quamba(Procedure):
    """Quantise the Mamba blocks of a model to 8 bits. Lossy, needs no training, no gradients after.

    Embedding, norms, residual stream and output matrix stay as they are.

    Example:
        >>> model = MambaForCausalLM(MambaLMConfig(embed_dim=16, num_layers=1, vocab_size=32))
        >>> plan = Quamba().plan(model, [{"input_ids": torch.randint(32, (1, 20))}])
        >>> small = plan.apply(model)
        >>> small.layers[0].mixer.in_proj.dtype
        torch.int8
    """

    name: ClassVar[str] = "quamba"
    settings_class: ClassVar[type[Config]] = QuambaConfig
    settings: QuambaConfig

    def plan(self, model: nn.Module, calibration: Iterable[Batch] | None = None) -> Plan:
        """Observe every activation over the calibration; the model is not changed.

        Args:
            model: holds Mamba-1 blocks of ours: a `MambaForCausalLM`, a `MixerLM` with mamba.
            calibration: batches with ``tokens`` or ``input_ids`` and, if padded, ``mask`` or
                ``attention_mask``. Their order matters. The paper takes 512 texts of up to 512
                tokens, one a batch.

        Raises:
            ValueError: no calibration, no block, a NaN in an activation, or an inner width that
                has no rotation (pass hadamard=False).
        """
        if calibration is None:
            raise ValueError("quamba needs a calibration: batches of token ids of real text")
        c = self.settings
        found, kept = observe(
            model, calibration, percentile=c.percentile, hadamard=c.hadamard,
            keep=c.report_batches,
        )  # fmt: skip
        blocks = mamba_blocks(model)
        tensors = {
            f"{path}.scales": torch.cat([scales[name] for name in SITES])
            for path, scales in ((p, o.scales()) for p, o in found.items())
        }
        sizes = [linear_bytes(b) for b in blocks.values()]
        measured: dict[str, Any] = {
            "linear_bytes": {k: sum(s[k] for s in sizes) for k in ("float16", "int8")}
        }
        if c.report_batches:
            measured["blocks"] = {
                path: block_report(
                    block.eval(), found[path], kept[path], percentile=c.percentile is not None
                )
                for path, block in blocks.items()
            }
        structure = {"blocks": list(blocks), "mode": c.mode, "hadamard": c.hadamard}
        return self._plan(model, structure, tensors=tensors, measured=measured)

    @classmethod
    def apply(cls, plan: Plan, model: nn.Module) -> nn.Module:
        made, hadamard = _MODES[plan.structure["mode"]], bool(plan.structure["hadamard"])
        blocks = mamba_blocks(model)
        for path in plan.structure["blocks"]:
            values = plan.tensors[f"{path}.scales"]
            scales = {name: values[i : i + 1] for i, name in enumerate(SITES)}
            block = made.from_float(blocks[path], scales, hadamard=hadamard)
            model.set_submodule(path, block)
        return model

    @classmethod
    def restructure(cls, structure: dict[str, Any], model: nn.Module) -> nn.Module:
        made, hadamard = _MODES[structure["mode"]], bool(structure["hadamard"])
        blocks = mamba_blocks(model)
        for path in structure["blocks"]:
            block = blocks[path]
            shell = made(block.config, hadamard=hadamard).to(block.in_proj.weight.device)
            model.set_submodule(path, shell.train(block.training))
        return model
