"""VOLO: outlookers on a fine grid, transformers on a coarse one, class attention (2106.13112).

B batch, H and W rows and columns, C channels, N tokens of 16 x 16 pixels.

Yuan et al., "VOLO: Vision Outlooker for Visual Recognition". Maps are channels last inside, as in
the paper; images and feature maps are (B, C, H, W).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from manyheads.config import Config
from manyheads.layers.keymap import Entry, KeyMap, rename
from manyheads.layers.packed import pack_linears
from manyheads.models.base import register_variants
from manyheads.models.vision.base import VisionModel, check_images, run_blocks
from manyheads.models.vision.volo.blocks import (
    Block,
    ClassBlock,
    Downsample,
    PatchEmbed,
    make_stage,
)
from manyheads.models.vision.volo.config import VARIANTS, VOLOConfig
from manyheads.models.vision.volo.mixing import Box, check_box, mix_box, mix_tokens
from manyheads.models.vision.volo.weights import fitted, resize_grid

__all__ = ["VOLO", "TokenOutputs"]


class TokenOutputs(NamedTuple):
    """What token labels train: logits (B, classes), of tokens (B, N, classes), the mixed box."""

    logits: Tensor
    token_logits: Tensor
    box: Box


class VOLO(VisionModel):
    """The backbone; ``forward`` returns logits (B, classes), in training too unless told otherwise.

    Images have sides of multiples of 16; positions are resized for other sizes than
    ``image_size``.

    Example:
        >>> sizes = {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (3, 4)}
        >>> model = VOLO(VOLOConfig(**sizes, mlp_ratios=(3, 3), image_size=64, num_classes=10))
        >>> model(torch.randn(2, 3, 64, 96)).shape
        torch.Size([2, 10])
        >>> model.forward_train(torch.randn(2, 3, 64, 64)).token_logits.shape
        torch.Size([2, 16, 10])
    """

    config_class: ClassVar[type[Config]] = VOLOConfig
    config: VOLOConfig
    classifier_names = ("head", "aux_head")
    first_conv = "patch_embed.conv.0"

    def __init__(self, config: VOLOConfig) -> None:
        super().__init__()
        self.config = c = config
        self.num_classes, self.num_features = c.num_classes, c.embed_dims[-1]
        self.patch_embed = PatchEmbed(c.in_channels, c.stem_dim, c.embed_dims[0])
        self.pos_embed = nn.Parameter(torch.empty(1, *c.grid, c.embed_dims[-1]))
        self.position_dropout = nn.Dropout(c.position_dropout)
        stages: list[nn.Module] = [make_stage(c, i) for i in range(len(c.depths))]
        stages.insert(1, Downsample(c.embed_dims[0], c.embed_dims[1]))
        self.network = nn.ModuleList(stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 16 if i else 8, "module": f"network.{i + (i > 0)}"}
            for i, dim in enumerate(c.embed_dims)
        ]
        if c.class_blocks:
            self.cls_token = nn.Parameter(torch.empty(1, 1, c.embed_dims[-1]))
            self.post_network = nn.ModuleList(
                ClassBlock(
                    c.embed_dims[-1],
                    num_heads=c.num_heads[-1],
                    mlp_ratio=c.mlp_ratios[-1],
                    qkv_bias=c.qkv_bias,
                    attention_dropout=c.attention_dropout,
                )
                for _ in range(c.class_blocks)
            )
        self.norm = nn.LayerNorm(self.num_features)
        self.dropout = nn.Dropout(c.dropout)
        self.head = self.make_classifier(c.num_classes)
        self.aux_head = self._make_aux(c.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name in self.no_weight_decay():
            nn.init.trunc_normal_(self.get_parameter(name), std=0.02)

    def iter_stages(self, x: Tensor) -> Iterator[Tensor]:
        _check_sides(x)
        yield from self._stages(self.patch_embed(x))

    def _stages(self, x: Tensor) -> Iterator[Tensor]:
        for i, stage in enumerate(self.network):
            if i == 1:
                x = stage(x)
                x = self.position_dropout(x + self._positions(x))
            else:
                x = run_blocks(stage, x, checkpointing=self.grad_checkpointing)
                yield x

    def _positions(self, x: Tensor) -> Tensor:
        return resize_grid(self.pos_embed, (x.shape[1], x.shape[2])).to(x)

    def as_map(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)

    def finish(self, x: Tensor) -> Tensor:
        """Return normed tokens (B, 1 + N, C), the class token first, of a map (B, H, W, C)."""
        x = x.flatten(1, 2)
        if self.config.class_blocks:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(x), x), 1)
            x = run_blocks(self.post_network, x, checkpointing=self.grad_checkpointing)
        return self.norm(x)

    def normalise_map(self, x: Tensor, index: int) -> Tensor:
        """The first stage has another width than the norm; the others are normed."""
        return self.as_map(self.norm(x.permute(0, 2, 3, 1))) if index else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x
        if self.config.global_pool:
            pooled = x.mean(1) if self.config.global_pool == "avg" else x[:, 0]
        pooled = self.dropout(pooled)
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        if self.aux_head is not None and self.config.global_pool:
            logits = logits + 0.5 * self.aux_head(self.dropout(x[:, 1:])).amax(1)
        return logits

    def forward(self, x: Tensor) -> Any:
        """Return logits (B, classes); with ``token_labels`` in training what forward_train does."""
        if self.training and self.config.token_labels:
            return self.forward_train(x)
        return super().forward(x)

    def forward_train(
        self,
        x: Tensor,
        *,
        box: tuple[int, int, int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenOutputs:
        """Return what token labels are compared with; see :func:`token_label_loss`.

        With ``mix_token`` in training mode the tokens of a box come from the batch in reverse, and
        the token logits are put back, so that those of an image are all under its own index.

        Args:
            x: images (B, C, H, W).
            box: (top, left, bottom, right) in tokens of 16 pixels; None: drawn.
            generator: of the box.

        Raises:
            ValueError: the model has no classifier of tokens, or the box is not on the grid.
        """
        if self.aux_head is None or not self.config.has_token_labels:
            raise ValueError(
                "this model has no class token beside a classifier of tokens: build it with "
                "dense=True, class_blocks, num_classes and global_pool='token'"
            )
        check_images(x, self.config.in_channels)
        _check_sides(x)
        grid = (x.shape[2] // 16, x.shape[3] // 16)
        if box is None:
            mixes = self.config.mix_token and self.training
            found = mix_box(grid, generator=generator) if mixes else Box()
        else:
            found = check_box(box, grid)
        x = self.patch_embed(x)
        if found.area:
            x = mix_tokens(x, found, scale=2)
        for out in self._stages(x):
            last = out
        tokens = self.dropout(self.finish(last))
        token_logits = self.aux_head(tokens[:, 1:])
        if found.area:
            token_logits = mix_tokens(token_logits.unflatten(1, grid), found).flatten(1, 2)
        return TokenOutputs(self.head(tokens[:, 0]), token_logits, found)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classifiers; ``global_pool``: "token", "avg" or "" from now on.

        Raises:
            ValueError: a negative number, or an unknown pooling.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes {num_classes} must not be negative")
        pool = self.config.global_pool if global_pool is None else global_pool
        self.config = self.config.replace(num_classes=num_classes, global_pool=pool)
        self.num_classes = num_classes
        self.head = self.make_classifier(num_classes).to(self.pos_embed)
        aux = self._make_aux(num_classes)
        self.aux_head = None if aux is None else aux.to(self.pos_embed)

    def _make_aux(self, num_classes: int) -> nn.Module | None:
        return self.make_classifier(num_classes) if self.config.dense and num_classes else None

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"} if self.config.class_blocks else {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stem = r"^(?:cls_token|pos_embed|patch_embed)"
        if coarse:
            return {"stem": stem, "blocks": [(r"^network\.(\d+)", None), _LAST]}
        blocks = [(r"^network\.(\d+)\.(\d+)", None), (r"^network\.(\d+)", (0,)), _LAST]
        return {"stem": stem, "blocks": blocks}

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """See :attr:`VisionModel.pretrained_cfg`; both classifiers are named."""
        names = self.classifier_names if self.config.dense else self.classifier_names[:1]
        classifier = names if len(names) > 1 else names[0]
        own = {"crop_pct": self.config.crop_pct, "classifier": classifier}
        return super().pretrained_cfg | own

    default_cfg = pretrained_cfg

    def fuse(self) -> Self:
        """Return a copy for inference: equal up to rounding, fewer operators.

        Batch norms and scales are folded, convolutions run channels last, class attention makes
        neither keys nor values, and on an x86 CPU products with weights are packed.
        """
        fused = copy.deepcopy(self).eval()
        for module in fused.modules():
            if isinstance(module, PatchEmbed | Block | ClassBlock):
                module.fold()
        pack_linears(fused)
        return fused.to(memory_format=torch.channels_last).requires_grad_(False)

    def load_official(self, source: Any) -> Self:
        """Load an official checkpoint, or timm's, which has the same names; strictly.

        A wrapper (``state_dict_ema``, ``state_dict``) and the prefix ``module.`` are taken off.
        Positions of another image size are resized; classifiers of another number of classes are
        left as they are, with a warning.

        Raises:
            ValueError: keys are missing, left over or of another shape.
        """
        weights = fitted(source, grid=self.config.grid, heads=self._heads())
        return super().load_official(weights)

    def _heads(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.state_dict().items() if n.startswith(("head.", "aux_head."))}

    def key_map(self) -> KeyMap:
        """Our names are the official ones."""
        entries: list[Entry] = []
        for name in self.state_dict():
            parts = ("{}" if p.isdigit() else p for p in name.split("."))
            general = ".".join(parts)
            entries.append(rename(general, general))
        return KeyMap(*dict.fromkeys(entries))


_LAST = (r"^(?:post_network|norm|head|aux_head)", (99999,))


def _check_sides(x: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    for name, size in (("height", x.shape[2]), ("width", x.shape[3])):
        if size % 16 or not size:
            near = [s for s in (size // 16 * 16, size // 16 * 16 + 16) if s]
            raise ValueError(
                f"{name} {size} is not a multiple of 16: resize or pad the images to "
                f"{' or '.join(map(str, near))}"
            )


register_variants(VOLO, "volo", VARIANTS)
