"""The model, its variants and its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from manyheads.attention.grid.distance import DistanceAttention
from manyheads.config import Config
from manyheads.layers.conv_norm import ConvNorm
from manyheads.layers.keymap import KeyMap, read_weights
from manyheads.models.base import register_variants
from manyheads.models.vision.efficientformer.blocks import MapBlock, Stage, TokenBlock
from manyheads.models.vision.efficientformer.config import EfficientFormerConfig
from manyheads.models.vision.efficientformer.keys import (
    DENSE_SIDE,
    fitted,
    official_map,
    timm_map,
)
from manyheads.models.vision.two_heads import TwoHeadModel

__all__ = ["EfficientFormer"]


class EfficientFormer(TwoHeadModel):
    """A backbone of pooling blocks on maps and a few attention blocks on the last tokens.

    Example:
        >>> config = EfficientFormerConfig(depths=(1, 1, 1, 2), num_classes=10)
        >>> EfficientFormer(config).eval()(torch.randn(1, 3, 96, 160)).shape
        torch.Size([1, 10])
    """

    config_class: ClassVar[type[Config]] = EfficientFormerConfig
    config: EfficientFormerConfig

    def __init__(self, config: EfficientFormerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.num_features = c.embed_dims[-1]
        self.num_classes = 0 if c.stage_norms else c.num_classes
        first = c.embed_dims[0]
        self.stem = nn.Sequential(
            ConvNorm(c.in_channels, first // 2, 3, stride=2),
            nn.ReLU(),
            ConvNorm(first // 2, first, 3, stride=2),
            nn.ReLU(),
        )
        self.stages = nn.ModuleList(_stage(c, i) for i in range(len(c.depths)))
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(c.embed_dims)
        ]
        if c.stage_norms:
            self.norms = nn.ModuleList(nn.GroupNorm(1, d, eps=c.norm_eps) for d in c.embed_dims)
            self.norm: nn.Module = nn.Identity()
        else:
            self.norm = nn.LayerNorm(self.num_features, eps=c.norm_eps)
        self.apply(_initialise)
        self.make_heads()

    def iter_stages(self, x: Tensor) -> Iterator[Tensor]:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x, self.grad_checkpointing)
            yield x

    def finish(self, x: Tensor) -> Tensor:
        """Return the normed tokens (B, N, C) of the last map."""
        return self.norm(x.flatten(2).mT)

    def normalise_map(self, x: Tensor, index: int) -> Tensor:
        if self.config.stage_norms:
            return self.norms[index](x)
        if index < len(self.feature_info) - 1:
            return x
        return self.finish(x).mT.unflatten(2, x.shape[2:])

    def pool(self, x: Tensor) -> Tensor:
        return x.mean(1)

    def forward(self, x: Tensor) -> Any:
        """Return logits (B, classes), or with ``stage_norms`` the normed map of every stage."""
        if self.config.stage_norms:
            return self.forward_intermediates(x, norm=True, intermediates_only=True)
        return super().forward(x)

    def no_weight_decay(self) -> set[str]:
        return {n for n, _ in self.named_parameters() if n.endswith("biases")}

    def key_map(self) -> KeyMap:
        """Names of snap-research/EfficientFormer."""
        return official_map(self.config)

    def load_official(self, source: Any) -> Self:
        """Load an official checkpoint, or one under timm's names; strictly.

        Biases that were trained for another size of image are resized by distance. A model with
        ``stage_norms`` takes a classifier's checkpoint as well: see the module ``keys``.

        Raises:
            ValueError: keys are missing, left over or of another shape.
        """
        weights = fitted(read_weights(source), self.config)
        if "stem.conv1.weight" not in weights:
            return super().load_official(weights)
        ours = timm_map(self.config).to_ours(weights, dict(self.state_dict(keep_vars=True)))
        self.load_state_dict(ours, assign=any(t.is_meta for t in self.state_dict().values()))
        return self


def _stage(c: EfficientFormerConfig, index: int) -> Stage:
    dim, before = c.embed_dims[index], sum(c.depths[:index])
    down: nn.Module = nn.Identity()
    if index:
        down = ConvNorm(c.embed_dims[index - 1], dim, 3, stride=2)
    blocks: list[nn.Module] = []
    for j in range(c.depths[index]):
        common: dict[str, Any] = {
            "mlp_ratio": c.mlp_ratio,
            "layer_scale": c.layer_scale,
            "drop_path": c.drop_path * (before + j) / max(sum(c.depths) - 1, 1),
            "dropout": c.dropout,
        }
        if c.is_token_block(index, j):
            mixer = DistanceAttention(
                dim,
                grid=c.grid,
                num_heads=c.num_heads,
                key_dim=c.key_dim,
                value_ratio=c.value_ratio,
                dense_side=DENSE_SIDE if c.stage_norms else None,
            )
            blocks.append(TokenBlock(dim, mixer, norm_eps=c.norm_eps, **common))
        else:
            blocks.append(MapBlock(dim, pool_size=c.pool_size, **common))
    return Stage(down, blocks)


def _initialise(module: nn.Module) -> None:
    """Truncated normal of 0.02 in MLPs and linear maps; other convolutions keep torch's."""
    layers: list[nn.Module] = []
    if isinstance(module, MapBlock):
        layers = [module.mlp.fc1.conv, module.mlp.fc2.conv]
    elif isinstance(module, nn.Linear):
        layers = [module]
    for layer in layers:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


_TABLE: Mapping[str, tuple[EfficientFormerConfig, tuple[str, ...]]] = {
    "efficientformer_l1": (EfficientFormerConfig(), ("efficientformer",)),
    "efficientformer_l3": (
        EfficientFormerConfig(
            depths=(4, 4, 12, 6), embed_dims=(64, 128, 320, 512), token_blocks=4
        ),
        (),
    ),
    "efficientformer_l7": (
        EfficientFormerConfig(
            depths=(6, 6, 18, 8), embed_dims=(96, 192, 384, 768), token_blocks=8
        ),
        (),
    ),
}  # fmt: skip
register_variants(EfficientFormer, "efficientformer", _TABLE)
