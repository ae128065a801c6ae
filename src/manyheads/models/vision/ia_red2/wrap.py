"""Token dropping for a vision transformer that exists already, of timm or of the same shape.

B batch, N tokens (those that are never dropped first), C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from manyheads.models.vision.ia_red2.config import check_groups
from manyheads.models.vision.ia_red2.dropping import Dropping

__all__ = ["DroppingViT", "wrap"]

_NEEDED = ("patch_embed", "_pos_embed", "blocks", "norm", "forward_head", "cls_token")
# Blocks that read where a token stands take it from its place in the sequence.
_BOUND = ("rope", "rel_pos", "rel_pos_bias", "shared_rel_pos", "relative_position_bias_table")


def wrap(
    model: nn.Module,
    groups: Sequence[int] | int = 3,
    *,
    interpreter_heads: int = 6,
    first_score: float = 0.7,
    threshold: float = 0.5,
) -> DroppingViT:
    """Put interpreters into a vision transformer; it needs training before it drops anything.

    The model itself is not copied and not changed: the two share all weights. A new wrapper
    answers as the model does, because new interpreters keep every token.

    Args:
        model: a ``VisionTransformer`` of timm (DeiT, ViT, AugReg, DINO, CLIP's visual towers with
            a class token), or a model with its attributes ``patch_embed``, ``_pos_embed``,
            ``blocks``, ``norm``, ``cls_token`` and ``forward_head``.
        groups: blocks behind each interpreter, or a number of groups that divides the blocks.
        interpreter_heads: of every interpreter.
        first_score: of new interpreters.
        threshold: tokens that score above it are kept.

    Raises:
        ValueError: no such transformer, one that pools other tokens than the class token, blocks
            that read places from the order of tokens, or groups that do not fit.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10)
        >>> wrapped = wrap(vit, groups=3)
        >>> wrapped(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    missing = [n for n in _NEEDED if getattr(model, n, None) is None]
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no {', '.join(missing)}: give a VisionTransformer of timm "
            "with a class token, or a model with these attributes"
        )
    pool = getattr(model, "global_pool", "token")
    if pool != "token":
        raise ValueError(
            f"{type(model).__name__} pools {pool!r}: the class token has to be what is read; build "
            "the model with global_pool='token'"
        )
    bound = [n for m in model.modules() for n in _BOUND if getattr(m, n, None) is not None]
    if bound:
        raise ValueError(
            f"{type(model).__name__} has {bound[0]}, which reads places from the order of tokens: "
            "gathered tokens would be taken for others"
        )
    patch_drop = getattr(model, "patch_drop", None)
    if patch_drop is not None and not isinstance(patch_drop, nn.Identity):
        raise ValueError(
            f"{type(model).__name__} drops patches by chance: build it with patch_drop_rate=0"
        )
    count = len(model.blocks)  # type: ignore[arg-type]
    if isinstance(groups, int):
        if groups < 1 or count % groups:
            raise ValueError(
                f"groups {groups} does not divide {count} blocks: give the blocks of each group"
            )
        groups = (count // groups,) * groups
    return DroppingViT(
        model,
        check_groups(tuple(groups), count),
        interpreter_heads=interpreter_heads,
        first_score=first_score,
        threshold=threshold,
    )


class DroppingViT(Dropping):
    """A foreign transformer with interpreters: see :func:`wrap`, which makes it.

    Args:
        model: the transformer, shared.
        depths: blocks of each group.
        interpreter_heads, first_score, threshold: as in :func:`wrap`.
    """

    def __init__(
        self,
        model: Any,
        depths: tuple[int, ...],
        *,
        interpreter_heads: int,
        first_score: float,
        threshold: float,
    ) -> None:
        super().__init__()
        self.model = model
        self.depths, self.threshold = depths, threshold
        self.prefix = int(getattr(model, "num_prefix_tokens", 1))
        width = model.cls_token.shape[-1]
        self.make_interpreters(width, interpreter_heads, first_score)
        self.interpreters.to(model.cls_token)
        self.num_classes = getattr(model, "num_classes", None)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        embedded = self.model._pos_embed(self.model.patch_embed(x))
        pre = getattr(self.model, "norm_pre", None)
        rows, columns = getattr(self.model.patch_embed, "patch_size", (0, 0))
        count = embedded.shape[1] - self.prefix
        grid: tuple[int, ...] = (x.shape[2] // rows, x.shape[3] // columns) if rows else (count,)
        return (embedded if pre is None else pre(embedded)), grid

    def all_blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def read_out(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.model.norm(x[:, : self.prefix])
        return normed[:, 0], self.model.forward_head(normed)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W)."""
        embedded, _ = self.embed(x)
        checkpointing = bool(getattr(self.model, "grad_checkpointing", False))
        for tokens, _ in self.run_groups(embedded, self.greedy, checkpointing=checkpointing):
            last = tokens
        return self.read_out(last.x)[1]

    def save_interpreters(self) -> dict[str, Tensor]:
        """Return the interpreters' weights alone, under the released names."""
        return {f"groups.{k.replace('.', '.agent.', 1)}": t
                for k, t in self.interpreters.state_dict().items()}  # fmt: skip
