"""A supernet in which every slot is a mixture of blocks: where slimming starts. A reconstruction.

B batch, C channels, H and W rows and columns. The paper describes the search (section 4.2); its
code was not published. x <- Σ_n softmax((α_n + ε_n) / τ) · block_n(x), ε Gumbel noise in training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.grid.distance import DistanceAttention
from manyheads.layers.keymap import KeyMap
from manyheads.models.vision.efficientformer.blocks import MapBlock, TokenBlock
from manyheads.models.vision.efficientformer.config import EfficientFormerConfig
from manyheads.models.vision.efficientformer.model import EfficientFormer

__all__ = ["Slot", "Supernet"]


class Slot(nn.Module):
    """A mixture of a block on maps, a block on tokens where there is one, and the identity.

    Args:
        config: of the supernet.
        dim: C.
        grid: rows and columns of the map, or None for a slot without a block on tokens.

    Attributes:
        logits: α, in the order map, token (if any), identity.
    """

    def __init__(
        self, config: EfficientFormerConfig, dim: int, grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        c = config
        self.temperature = 1.0
        self.map = MapBlock(dim, pool_size=c.pool_size, mlp_ratio=c.mlp_ratio,
                            layer_scale=c.layer_scale)  # fmt: skip
        self.token: TokenBlock | None = None
        if grid is not None:
            mixer = DistanceAttention(dim, grid=grid, num_heads=c.num_heads, key_dim=c.key_dim,
                                      value_ratio=c.value_ratio)  # fmt: skip
            self.token = TokenBlock(dim, mixer, mlp_ratio=c.mlp_ratio, layer_scale=c.layer_scale)
        self.logits = nn.Parameter(torch.zeros(2 if self.token is None else 3))

    def importance(self) -> float:
        """Return the blocks' share over the identity's, Σ exp α / exp α_identity."""
        shares = self.logits.detach().double().softmax(0)
        return float(shares[:-1].sum() / shares[-1])

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            shares = F.gumbel_softmax(self.logits, self.temperature, dim=0)
        else:
            shares = (self.logits / self.temperature).softmax(0)
        out = shares[0] * self.map(x) + shares[-1] * x
        if self.token is not None:
            grid = (x.shape[2], x.shape[3])
            mixed = self.token(x.flatten(2).mT, grid).mT.unflatten(2, grid)
            out = out + shares[1] * mixed
        return out


class Supernet(EfficientFormer):
    """EfficientFormer with a mixture in every place, to be trained and then slimmed.

    The first stages choose between a block on maps and none, the last two also blocks on tokens.
    Needs training before its importances mean anything; lower :meth:`set_temperature` meanwhile.

    Args:
        config: ``depths`` are the slots of each stage, ``embed_dims`` the widest widths, multiples
            of 16.

    Raises:
        ValueError: a width that is not a multiple of 16.

    Example:
        >>> config = EfficientFormerConfig(depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64))
        >>> Supernet(config).eval()(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 1000])
    """

    def __init__(self, config: EfficientFormerConfig) -> None:
        for index, dim in enumerate(config.embed_dims):
            if dim % 16:
                raise ValueError(
                    f"embed_dims of stage {index} is {dim}, not a multiple of 16: latencies are "
                    f"tabled by 16 channels, take {-(-dim // 16) * 16}"
                )
        config = config.replace(token_blocks=0)
        super().__init__(config)
        count = len(config.depths)
        sides = config.grid
        for i, (dim, stage) in enumerate(zip(config.embed_dims, self.stages, strict=True)):
            scale = 2 ** (count - 1 - i)
            grid = (sides[0] * scale, sides[1] * scale) if i >= count - 2 else None
            slots = [Slot(config, dim, grid) for _ in range(config.depths[i])]
            stage.register_module("blocks", nn.ModuleList(slots))

    def slots(self) -> list[list[Slot]]:
        """Return the slots of each stage."""
        return [
            [b for b in stage.get_submodule("blocks").children() if isinstance(b, Slot)]
            for stage in self.stages
        ]

    def set_temperature(self, temperature: float) -> None:
        """Set τ of all slots: towards 0 one block takes it all.

        Raises:
            ValueError: it is not positive.
        """
        if temperature <= 0:
            raise ValueError(f"temperature {temperature} must be positive")
        for slot in (s for stage in self.slots() for s in stage):
            slot.temperature = temperature

    def key_map(self) -> KeyMap:
        raise ValueError("a Supernet has no official checkpoints: use save() and load()")
