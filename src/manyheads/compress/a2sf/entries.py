"""Cached tokens as tensors side by side, (B batch, G key-value heads, n tokens, ...) each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Entries", "dequantise", "quantise", "restored", "stored"]


class Entries:
    """What is held for each token, by name. Heads may hold different tokens, but equally many."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def append(self, other: Entries) -> Entries:
        """Return these tokens and the other's after them."""
        return Entries({k: torch.cat((t, other[k]), 2) for k, t in self.tensors.items()})

    def keep(self, index: Tensor) -> Entries:
        """Return the tokens at ``index`` (B, G, m), in that order."""
        batch, groups, kept = index.shape
        rows = torch.arange(batch * groups, device=index.device).view(batch, groups, 1)
        flat = (index + rows * len(self)).reshape(-1)

        def take(tensor: Tensor) -> Tensor:
            rest = tensor.shape[3:]
            return tensor.flatten(0, 2).index_select(0, flat).view(batch, groups, kept, *rest)

        return self.map(take)

    def map(self, change: Callable[[Tensor], Tensor]) -> Entries:
        """Return the tokens with every tensor changed."""
        return Entries({k: change(t) for k, t in self.tensors.items()})


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 numbers and one scale a token and head, the largest magnitude over 127.

    Args:
        x: (B, G, n, D).

    Returns:
        (B, G, n, D) int8 and (B, G, n, 1) in ``x``'s dtype, float32 for half precision.

    Example:
        >>> number, scale = quantise(torch.tensor([[[[1.0, -2.0]]]]))
        >>> number.tolist(), round(float(scale), 4)
        ([[[[64, -127]]]], 0.0157)
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(-1, keepdim=True) / 127
    number = (wide / scale.clamp_min(torch.finfo(wide.dtype).tiny)).round().clamp(-127, 127)
    return number.to(torch.int8), scale


def dequantise(number: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what :func:`quantise` was given, rounded."""
    return (number.to(scale.dtype) * scale).to(dtype)


def stored(key: Tensor, value: Tensor, bits: int | None) -> dict[str, Tensor]:
    """Return what is held of keys and values: themselves, or with 8 bits int8 and its scales."""
    if bits is None:
        return {"key": key, "value": value}
    (k, k_scale), (v, v_scale) = quantise(key), quantise(value)
    return {"key": k, "key_scale": k_scale, "value": v, "value_scale": v_scale}


def restored(held: Entries, name: str, dtype: torch.dtype) -> Tensor:
    """Return "key" or "value" of what :func:`stored` gave, in ``dtype``."""
    scale = held.tensors.get(name + "_scale")
    return held[name] if scale is None else dequantise(held[name], scale, dtype)
