"""Moving a transformers model's rotary keys to other positions, checked on the model's own code.

B batch, G key-value heads, n keys, D head dim, R rotated dims.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.compress.a2sf.state import Rotate
from manyheads.layers.rotary import apply_rotary

__all__ = ["rotation"]

_TOLERANCE = 1e-4


def rotation(model: nn.Module) -> Rotate:
    """Return a function that moves keys (B, G, n, D) by whole positions (B, G, n).

    It is tried before it is returned: a key at position 3 moved by 4 has to be the key at 7 by
    the model's own rotary code.

    Raises:
        ValueError: no rotary positions, ones that change with the length, or another layout.
    """
    named = [m for _, m in model.named_modules() if hasattr(m, "inv_freq")]
    kind = type(model).__name__
    if not named:
        raise ValueError(
            f"{kind} has no rotary positions, so that its keys cannot be moved: use sink-recent"
        )
    rotary: Any = named[0]
    rope = getattr(rotary, "rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ValueError(
            f"{kind} has rotary positions of type {rope!r}, which change with the length: use "
            "sink-recent"
        )
    frequency = rotary.inv_freq.detach().float()

    def rotate(keys: Tensor, shift: Tensor) -> Tensor:
        width = 2 * frequency.numel()
        angle = shift[..., None].float() * frequency.to(keys.device)
        wide = keys[..., :width].to(torch.promote_types(keys.dtype, torch.float32))
        turned = apply_rotary(wide, angle.cos(), angle.sin()).to(keys.dtype)
        return turned if width == keys.shape[-1] else torch.cat((turned, keys[..., width:]), -1)

    own = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None)
    if own is None or not _agrees(rotate, rotary, own, frequency):
        raise ValueError(
            f"{kind}'s rotary positions are laid out in a way that is not known: use sink-recent"
        )
    return rotate


def _agrees(rotate: Rotate, rotary: Any, own: Callable[..., Any], frequency: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    width = 2 * frequency.numel()
    key = torch.randn(1, 1, 1, width, generator=generator).to(frequency.device)
    at = {}
    for place in (3, 7):
        ids = torch.tensor([[place]], device=frequency.device)
        try:
            cos, sin = rotary(key, ids)
            at[place] = own(key, key, cos, sin)[1]
        except (TypeError, ValueError, RuntimeError):
            return False
    moved = rotate(at[3], torch.full((1, 1, 1), 4, device=frequency.device))
    return bool((moved - at[7]).abs().max() < _TOLERANCE * at[7].abs().max())
