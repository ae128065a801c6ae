"""FLOPs of our own operators whose bodies may be compiled kernels, as their PyTorch forms count.

Only what is a matrix product in that form is counted, by the convention of `flop_formulas`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from manyheads.attention.aaren.fast import flops as prefix_flops
from manyheads.compress.quamba.hadamard import hadamard_split

__all__ = ["KERNELS"]

Arguments = Mapping[str, Any]


def _scan(a: Arguments, out: Any) -> int:
    return 2 * a["query"].numel() * a["value"].shape[-1]


def _scan_backward(a: Arguments, out: Any) -> int:
    # The gradients of query, key and value; for a gate the outputs once more.
    return (3 if a["gate"] is None else 4) * _scan(a, out)


def _conv(a: Arguments, out: Any) -> int:
    return 2 * a["x"].shape[0] * a["x"].shape[1] * a["weight"].numel()


def _conv_backward(a: Arguments, out: Any) -> int:
    return 2 * _conv(a, out)


def _prefix(a: Arguments, out: Any) -> int:
    values = a["values"]
    batch, heads, length, dim = values.shape
    return prefix_flops(batch * heads, length, dim, a["chunk_size"])


def _prefix_backward(a: Arguments, out: Any) -> int:
    # The weights by the gradients of the outputs, and by those of the normalisers.
    return _prefix(a, out)


def _gla_step(a: Arguments, out: Any) -> int:
    return 2 * a["memory"].numel()


def _recurrent(a: Arguments, out: Any) -> int:
    return 2 * a["query"].numel() * a["value"].shape[-1]


def _int8_linear(a: Arguments, out: Any) -> int:
    return 2 * a["x"].shape[0] * a["weight"].numel()


def _int8_scan(a: Arguments, out: Any) -> int:
    # Each channel of a token reads its states, as in the float scan.
    return 2 * a["u"].numel() * a["a"].shape[-1]


def _int8_rotate(a: Arguments, out: Any) -> int:
    # Products with the base matrix; Sylvester's part is additions.
    width = a["y"].shape[-1]
    base = hadamard_split(width)[0]
    return 2 * a["y"].numel() * base if base > 1 else 0


def _int8_step(a: Arguments, out: Any) -> int:
    batch, inner = a["x"].shape[0], a["a"].shape[0]
    base = hadamard_split(inner)[0] if a["rotated"] else 1
    products = sum(w.numel() for w in a["weights"]) + a["a"].numel()
    return 2 * batch * (products + (inner * base if base > 1 else 0))


def _landmark_decode(a: Arguments, out: Any) -> int:
    # Scores of all landmarks; keys and values of the fetched blocks, and of the token's own.
    heads, size = a["query"].shape[0] * a["query"].shape[1], a["keys"].shape[3]
    dim, values = a["query"].shape[2], out.shape[2]
    count = min(a["top_k"], a["stored"])
    own = 1 + (0 if a["tail_key"] is None else a["tail_key"].shape[2])
    near = min(own, size - 1) * (dim + values)
    far = a["stored"] * dim + count * (size * dim + (size - 1) * values)
    return 2 * heads * (near + far)


KERNELS: dict[str, Callable[[Arguments, Any], int]] = {
    "manyheads::gla_step": _gla_step,
    "manyheads::recurrent_scan": _recurrent,
    "manyheads::landmark_decode": _landmark_decode,
    "manyheads::aaren_step": lambda a, out: 0,
    "manyheads::prefix_softmax": _prefix,
    "manyheads::prefix_softmax_backward": _prefix_backward,
    "manyheads::mamba_scan": _scan,
    "manyheads::mamba_scan_backward": _scan_backward,
    "manyheads::mamba_step": _scan,
    "manyheads::int8_linear": _int8_linear,
    "manyheads::int8_float_linear": _int8_linear,
    "manyheads::int8_encode": lambda a, out: 0,
    "manyheads::int8_conv": _conv,
    "manyheads::int8_scan": _int8_scan,
    "manyheads::int8_rotate": _int8_rotate,
    "manyheads::int8_mamba_step": _int8_step,
    "manyheads::short_conv": _conv,
    "manyheads::short_conv_backward": _conv_backward,
}
"""Operator name to its FLOPs, from the arguments by name and the output."""
