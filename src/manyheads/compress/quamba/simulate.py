"""The simulated W8A8 block: every weight and activation reads back from its 8-bit code.

Lossy. Computed in float with the numbers that 8-bit codes stand for: as slow and as large as the
float block, for looking at what quantisation costs. `Int8Mamba` is the small and fast one.
"""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor, nn

from manyheads.attention.mamba import MambaConfig, MambaLayerState, MambaMixer
from manyheads.compress.quamba.calibrate import Scales
from manyheads.compress.quamba.hadamard import fold_hadamard, hadamard_split
from manyheads.compress.quamba.quantisers import absmax_scale, fake_quant
from manyheads.compress.quamba.sites import SITES, WEIGHTS, Trace, run_block
from manyheads.layers.keymap import KeyMap
from manyheads.layers.ragged import check_mask, map_packed

__all__ = ["SimulatedMamba", "weight_of"]


def weight_of(block: MambaMixer, name: str) -> nn.Parameter:
    """Return the parameter that one of `WEIGHTS` names."""
    part = getattr(block, name)
    weight = part if isinstance(part, nn.Parameter) else part.weight
    assert isinstance(weight, nn.Parameter)
    return weight


class SimulatedMamba(MambaMixer):
    """A Mamba block with 8-bit weights and activations, simulated in float. Lossy.

    The decode form equals the whole pass: codes depend on nothing but the values themselves.

    Attributes:
        scales: (10), of the activations at `SITES`, float32.
        hadamard: whether the scan's output is rotated, and ``out_proj`` holds the rotation.
    """

    scales: Tensor

    def __init__(self, config: MambaConfig, *, hadamard: bool) -> None:
        super().__init__(config)
        self.hadamard = hadamard
        if hadamard:
            hadamard_split(config.inner_dim)
        self.register_buffer("scales", torch.ones(len(SITES)))

    @classmethod
    @torch.no_grad()
    def from_float(cls, block: MambaMixer, scales: Scales, *, hadamard: bool = True) -> Self:
        """Quantise a float block with calibrated scales; the block is not changed.

        Raises:
            ValueError: a weight holds NaN, or E has no rotation.
        """
        made = cls(block.config, hadamard=hadamard)
        made.load_state_dict(copy.deepcopy(block.state_dict()), strict=False)
        made.scales.copy_(torch.cat([scales[name] for name in SITES]))
        if hadamard:
            fold_hadamard(made.out_proj)
        for name in WEIGHTS:
            weight = weight_of(made, name)
            weight.copy_(fake_quant(weight, absmax_scale(weight)))
        return made.train(block.training)

    def _at(self, name: str, t: Tensor) -> Tensor:
        # The bias is added before the step is quantised; the value without it only has a scale.
        return t if name == "dt_raw" else fake_quant(t, self.scales[SITES.index(name)])

    def trace(
        self, x: Tensor, *, state: MambaLayerState | None = None, mask: Tensor | None = None
    ) -> Trace:
        """Run (B, N, C) and return the output, the next state and the activations by site."""
        mask = check_mask(mask, x.shape[0], x.shape[1])
        return run_block(self, x, state=state, mask=mask, hadamard=self.hadamard, at=self._at)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        if cu_seqlens is not None:
            if mask is not None:
                raise ValueError("give mask or cu_seqlens, not both: packed tokens are all real")
            return map_packed(lambda t, m: self(t, mask=m), (x,), cu_seqlens, dim=1)[0]
        return self.trace(x, mask=mask).out

    def update(
        self, x: Tensor, state: MambaLayerState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, MambaLayerState]:
        out, after, _ = self.trace(x, state=state, mask=mask)
        return out, after

    def step(self, x: Tensor, state: MambaLayerState) -> tuple[Tensor, MambaLayerState]:
        out, after = self.update(x[:, None], state)
        return out[:, 0], after

    def key_map(self) -> KeyMap:
        """A quantised block has no official checkpoint."""
        raise ValueError("a quantised block has no official checkpoint: quantise a float one")
