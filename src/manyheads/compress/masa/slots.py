"""Where the attention matrices of a model lie, and sharing them in a model that is not trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from manyheads.compress.anatomy import Anatomy, Projection, anatomy
from manyheads.layers.sharing import SharedLinear, SharingConfig, Slot, share

__all__ = ["attention_slots", "check_whole", "share_attention"]


def share_attention(model: nn.Module, config: SharingConfig) -> nn.Module:
    """Let the layers of a model share attention matrices from the start, in place.

    For training: what the model had learnt in them is gone (:class:`MASA` keeps it). ViTs of
    timm and models of transformers; ours take ``sharing`` in their config.

    Args:
        model: built, of a family that :func:`~manyheads.compress.anatomy.anatomy` knows.
        config: what to share, and how.

    Raises:
        ValueError: a model that is not recognised or shares already, fewer layers than atoms.
    """
    found = attention_slots(model, anatomy(model), config.projections)
    return share(model, {name: list(own.values()) for name, own in found.items()}, config)


def attention_slots(
    model: nn.Module, parts: Anatomy, projections: Sequence[str]
) -> dict[str, dict[str, Slot]]:
    """Return the matrices of each projection by their block's path."""
    if parts.shared:
        raise ValueError(
            f"the layers of {type(model).__name__} share one block's weights already: nothing is "
            "left to share"
        )
    found: dict[str, dict[str, Slot]] = {name: {} for name in projections}
    for block, sublayer in parts.sublayers("attention"):
        for name in projections:
            p: Projection | None = getattr(sublayer.attention, name)
            if p is None:
                continue
            if isinstance(model.get_submodule(p.path), SharedLinear):
                raise ValueError(f"{p.path} is mixed from shared atoms already")
            found[name][block.path] = Slot(p.path, p.part, p.parts, p.transposed)
    for name, own in found.items():
        if not own:
            raise ValueError(f"{type(model).__name__} has no {name} matrices: leave {name!r} out")
    return found


def check_whole(
    slots: dict[str, dict[str, Slot]], modules: Mapping[str, Mapping[int, object]]
) -> None:
    counts = {s.path: s.parts for own in slots.values() for s in own.values()}
    for path, parts in modules.items():
        if len(parts) < counts[path]:
            raise ValueError(
                f"{path} holds {counts[path]} matrices in one and only {len(parts)} would be "
                "shared: name query, key and value together in projections"
            )
