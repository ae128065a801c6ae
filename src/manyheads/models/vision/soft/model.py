"""The SOFT backbone and its official names.

B batch, C channels, H and W rows and columns, N = H · W of stage 4.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from manyheads.attention.soft.module import attention_entries
from manyheads.config import Config
from manyheads.layers.keymap import Entry, KeyMap, read_weights, rename
from manyheads.models.vision.base import VisionModel, check_images, run_blocks
from manyheads.models.vision.soft.blocks import Stage, make_stage
from manyheads.models.vision.soft.config import SOFTConfig

__all__ = ["SOFT"]

# The released code's soft_small has 20 blocks in stage 3; the published size fits 7.
_SMALL = {(1, 3, 7, 4), (1, 3, 20, 4)}


class SOFT(VisionModel):
    """Backbone with softmax-free attention; linear in the number of places up to 224 px.

    ``forward_features`` returns the normed tokens (B, 1 + N, C) of stage 4, the class token
    first; the official code returns that token alone. At larger images the official layer has
    more landmarks, whose inverse grows with the sixth power of the side: ``max_landmarks=7``
    holds their number. With ``normalise`` and ``shared_step`` a result depends on the batch.

    Example:
        >>> model = SOFT(SOFTConfig(depths=(1, 1, 1, 1), max_landmarks=7))
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 1000])
    """

    config_class: ClassVar[type[Config]] = SOFTConfig
    config: SOFTConfig
    first_conv = "stages.0.embed.0"

    def __init__(self, config: SOFTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.num_classes, self.num_features = c.num_classes, c.embed_dims[-1]
        self.stages = nn.ModuleList(make_stage(c, i) for i in range(4))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.num_features))
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.head = self.make_classifier(c.num_classes)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}"}
            for i, dim in enumerate(c.embed_dims)
        ]
        self.apply(_initialise)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def iter_stages(self, x: Tensor) -> Iterator[Any]:
        self._check_size(x)
        x = x.contiguous(memory_format=torch.channels_last)
        for i in range(3):
            stage = cast(Stage, self.stages[i])
            x = stage.embedded(x, self.config.grids[i])
            x = run_blocks(stage.blocks, x, checkpointing=self.grad_checkpointing)
            x = x.permute(0, 3, 1, 2)
            yield x
        stage = cast(Stage, self.stages[3])
        x = stage.embedded(x, self.config.grids[3])
        size = (x.shape[1], x.shape[2])
        first = self.cls_token + stage.position[:, :1]
        x = torch.cat((first.to(x).expand(x.shape[0], -1, -1), x.flatten(1, 2)), 1)
        yield run_blocks(stage.blocks, x, checkpointing=self.grad_checkpointing), size

    def as_map(self, x: Any) -> Tensor:
        if isinstance(x, Tensor):
            return x
        tokens, size = x
        return tokens[:, 1:].mT.unflatten(2, size)

    def finish(self, x: tuple[Tensor, tuple[int, int]]) -> Tensor:
        return self.norm(x[0])

    def normalise_map(self, x: Tensor, index: int) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if index == 3 else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        first = x[:, 0]
        return first if pre_logits else self.head(first)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; it reads the class token, so ``global_pool`` may be "token".

        Raises:
            ValueError: a negative number, or a pooling that the model does not have.
        """
        if global_pool not in (None, "", "token"):
            raise ValueError(f"global_pool {global_pool!r}: the model pools by 'token'")
        super().reset_classifier(num_classes)

    def fuse(self) -> Self:
        """Return a copy for inference, batch norms folded away; equal up to rounding."""
        fused = copy.deepcopy(self).eval()
        for stage in fused.stages:
            embed = cast(Stage, stage).embed
            for i in range(0, len(embed), 3):
                conv, norm = embed[i], embed[i + 1]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    embed[i], embed[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
        return fused.requires_grad_(False)

    def load_official(self, source: Any) -> Self:
        """Load an official checkpoint, strictly.

        Two sizes go by the name of SOFT-Small: 7 blocks in stage 3 fit what was published, the
        released code has 20. A file of the other one changes this model's depth.

        Raises:
            ValueError: keys are missing, left over or of another shape.
        """
        weights = read_weights(source)
        found = {tuple(k.split(".")[:2]) for k in weights}
        depths = tuple(sum(name == f"block{i + 1}" for name, *_ in found) for i in range(4))
        if depths != self.config.depths and {depths, self.config.depths} <= _SMALL:
            self.config = self.config.replace(depths=depths)
            like = self.cls_token
            with torch.device(like.device):
                self.stages = nn.ModuleList(make_stage(self.config, i) for i in range(4)).to(like)
        return super().load_official(weights)

    def key_map(self) -> KeyMap:
        """Names of fudan-zvg/SOFT."""
        entries = [rename("cls_token", "cls_token"), *_both("norm"), *_both("head")]
        for i in range(4):
            ours, name = f"stages.{i}.", str(i + 1)
            entries.append(rename(ours + "position", "pos_embed" + name))
            entries += [
                rename(f"{ours}embed.{{}}.{part}", f"patch_embed{name}.proj.{{}}.{part}")
                for part in (
                    "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
                )
            ]  # fmt: skip
            block, theirs = ours + "blocks.{}.", f"block{name}.{{}}."
            if i < 3:
                entries += attention_entries(block + "attention.", theirs + "att.mha.")
                entries += _block_entries(block, theirs, {
                    "norm1": "att.norm1", "norm2": "att.norm2", "fc1": "att.ff1", "fc2": "att.ff2"
                })  # fmt: skip
            else:
                entries += _block_entries(block, theirs, {
                    "norm1": "norm1", "norm2": "norm2", "query": "attn.q", "key_value": "attn.kv",
                    "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
                })  # fmt: skip
        return KeyMap(*entries)

    def _check_size(self, x: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        check_images(x, self.config.in_channels)
        least = self.config.least_size
        for name, size in (("height", x.shape[2]), ("width", x.shape[3])):
            if size < least:
                raise ValueError(
                    f"{name} {size} is below {least}: a stage would be without landmarks; pad or "
                    "enlarge the images, or build the model with smaller ratios"
                )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, Stage):
        nn.init.trunc_normal_(module.position, std=0.02)


def _both(name: str) -> list[Entry]:
    return [rename(f"{name}.{part}", f"{name}.{part}") for part in ("weight", "bias")]


def _block_entries(ours: str, official: str, names: Mapping[str, str]) -> list[Entry]:
    return [
        rename(f"{ours}{a}.{part}", f"{official}{b}.{part}")
        for a, b in names.items()
        for part in ("weight", "bias")
    ]
