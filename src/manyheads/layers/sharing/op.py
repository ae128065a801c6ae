"""The product with a mixed matrix. S atoms, I inputs, O outputs, ... any axes of tokens.

y = x W^T + b with W = Σ_s c_s D_s. What backward keeps are x, the atoms and the coefficients,
which are there anyway: the mixed W of every layer would be as large as a model without sharing.
It is mixed again instead, S·O·I multiply-adds beside the 2·tokens·O·I of the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.layers.precision import no_autocast

__all__ = ["Pair", "mix", "shared_linear", "shared_linear_reference"]

Pair = tuple[Tensor, Tensor]  # atoms (S, O, I), coefficients (S)


def mix(atoms: Tensor, coefficients: Tensor) -> Tensor:
    """Return Σ_s c_s D_s (O, I) of atoms (S, O, I) and coefficients (S).

    Raises:
        ValueError: there are not as many coefficients as atoms.

    Example:
        >>> mix(torch.ones(2, 3, 5), torch.tensor([1.0, 2.0])).shape
        torch.Size([3, 5])
    """
    if atoms.ndim != 3 or coefficients.shape != atoms.shape[:1]:
        raise ValueError(
            f"atoms {tuple(atoms.shape)} and coefficients {tuple(coefficients.shape)} do not fit: "
            "give (atoms, outputs, inputs) and one coefficient an atom"
        )
    with no_autocast(atoms.device):
        flat = coefficients.to(atoms.dtype)[None] @ atoms.flatten(1)
    return flat.view(atoms.shape[1:])


def shared_linear_reference(x: Tensor, pairs: Sequence[Pair], bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b by mixing outputs, Σ_s c_s (x D_s^T): the oracle of the tests.

    Arguments as :func:`shared_linear`.
    """
    outputs = [
        sum(c * (x @ atom.mT) for c, atom in zip(coefficients, atoms, strict=True))
        for atoms, coefficients in pairs
    ]
    out = torch.cat([o for o in outputs if isinstance(o, Tensor)], -1)
    return out if bias is None else out + bias


def shared_linear(x: Tensor, pairs: Sequence[Pair], bias: Tensor | None = None) -> Tensor:
    """Multiply with matrices that are mixed from shared atoms (2508.04581); exact.

    Args:
        x: (..., I).
        pairs: atoms (S, O, I) and coefficients (S) of every part of the outputs, in order: one
            for a plain layer, three where query, key and value are one matrix.
        bias: over all outputs, or None.

    Returns:
        (..., sum of O), in the dtype of ``x`` (autocast's where that is on).

    Raises:
        ValueError: no pair, atoms and coefficients that do not fit, or inputs of another width.

    Example:
        >>> atoms, coefficients = torch.randn(2, 5, 7), torch.randn(2)
        >>> shared_linear(torch.randn(3, 4, 7), [(atoms, coefficients)]).shape
        torch.Size([3, 4, 5])
    """
    if not pairs:
        raise ValueError("shared_linear needs atoms and coefficients of one part at least")
    for atoms, _ in pairs:
        if atoms.ndim != 3 or x.shape[-1] != atoms.shape[2]:
            raise ValueError(
                f"x has {x.shape[-1]} channels in its last axis, the atoms "
                f"{tuple(atoms.shape)} take {atoms.shape[-1]}"
            )
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None:
        bias = bias.to(x.dtype)
    flat = [t for pair in pairs for t in pair]
    return _SharedLinear.apply(x, bias, *flat)


def _weight(flat: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    mixed = [mix(a, c) for a, c in zip(flat[::2], flat[1::2], strict=True)]
    return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).to(dtype)


class _SharedLinear(torch.autograd.Function):
    """F.linear that does not keep its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *flat: Tensor) -> Tensor:
        ctx.save_for_backward(x, *flat)
        return F.linear(x, _weight(flat, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *flat = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * (2 + len(flat))
        with no_autocast(x.device):
            if needs[0]:
                grads[0] = grad @ _weight(flat, grad.dtype)
            rows = grad.reshape(-1, grad.shape[-1])
            if needs[1]:
                grads[1] = rows.sum(0)
            if any(needs[2:]):
                whole = rows.mT @ x.reshape(-1, x.shape[-1])  # (sum of O, I)
                sizes = [atoms.shape[1] for atoms in flat[::2]]
                for i, part in enumerate(whole.split(sizes)):
                    atoms, coefficients = flat[2 * i], flat[2 * i + 1]
                    part = part.to(atoms.dtype)
                    if needs[2 + 2 * i]:
                        grads[2 + 2 * i] = coefficients.to(part)[:, None, None] * part
                    if needs[3 + 2 * i]:
                        own = atoms.flatten(1) @ part.reshape(-1)
                        grads[3 + 2 * i] = own.to(coefficients.dtype)
        return tuple(grads)
