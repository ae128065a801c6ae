"""Simulated quantisation of a whole model: the official post-training recipe of 2306.12929.

Every Linear, LayerNorm and Embedding has a quantised weight and (but for tables) a quantised
output; so has every tap of our own models. Biases, the inside of norms and gates stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from manyheads.compress.quantizable.estimators import RangeEstimator, Scheme
from manyheads.compress.quantizable.quantizers import UniformQuantizer
from manyheads.models.language.quantizable.attention import TiedHead

__all__ = ["ActivationQuantizer", "QuantizedHead", "QuantizedModule", "simulate_quantization"]


class ActivationQuantizer(nn.Module):
    """A quantiser whose range is estimated while ``estimating``, and fixed afterwards."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.quantizer = UniformQuantizer(bits=scheme.bits, symmetric=scheme.symmetric)
        self.estimator = RangeEstimator(scheme)
        self.estimating = False

    def forward(self, x: Tensor) -> Tensor:
        if self.estimating:
            self.quantizer.set_range(*self.estimator.update(x))
        return self.quantizer(x)


class QuantizedModule(nn.Module):
    """A module computed with its quantised weight, its output quantised in turn."""

    def __init__(self, inner: nn.Module, weights: Scheme, activations: Scheme | None) -> None:
        super().__init__()
        self.inner = inner
        self.weight_quantizer = UniformQuantizer(
            bits=weights.bits, symmetric=weights.symmetric, per_channel=weights.per_channel
        )
        self.weight_quantizer.set_range(*RangeEstimator(weights).update(self.weight))
        self.output = None if activations is None else ActivationQuantizer(activations)

    @property
    def weight(self) -> Tensor:
        """The weight as it is: what is tied to it is not quantised."""
        weight = self.inner.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        weight = {"weight": self.weight_quantizer(self.weight)}
        out = functional_call(self.inner, weight, args, kwargs)
        return out if self.output is None else self.output(out)


class QuantizedHead(nn.Module):
    """x Wᵀ with a matrix that the embedding has too: quantised here, and the logits as well."""

    def __init__(self, weights: Scheme, activations: Scheme) -> None:
        super().__init__()
        self.weights = weights
        self.weight_quantizer = UniformQuantizer(
            bits=weights.bits, symmetric=weights.symmetric, per_channel=weights.per_channel
        )
        self.output = ActivationQuantizer(activations)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.output.estimating:
            self.weight_quantizer.set_range(*RangeEstimator(self.weights).update(weight))
        return self.output(F.linear(x, self.weight_quantizer(weight)))


def simulate_quantization(
    model: nn.Module,
    calibration: Iterable[Mapping[str, Any]],
    *,
    weights: Scheme | None = None,
    activations: Scheme | None = None,
    skip: Iterable[str] = (),
    bits: Mapping[str, int] | None = None,
    tied_head: bool = False,
) -> nn.Module:
    """Return a copy of a model computed as 8-bit integers would be. Lossy; nothing gets smaller.

    Weights are quantised and ranges of activations estimated together, then fixed. To save bytes
    and time see :class:`Int8`.

    Args:
        model: of transformers, timm or ours.
        calibration: batches for ``model(**batch)``.
        weights: None for 8 bits, symmetric, extremes.
        activations: None for 8 bits with a zero point, running extremes. One range a tensor.
        skip: glob patterns of module paths that stay in floating point.
        bits: glob patterns of module paths whose weight and output have another number of bits,
            such as ``{"norm": 16}`` for the last norm of an OPT, ``{"*norm": 16}`` for all.
        tied_head: quantise the output matrix and the logits of :class:`QuantizableOPT` too, whose
            matrix is the embedding's; the paper's figures are without.

    Raises:
        ValueError: no batches, a pattern matches nothing, bits outside 2 to 16, activations by
            channel, no module is left to quantise, or there is no tied head of ours.

    Example:
        >>> from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
        >>> model = MixerLM(MixerLMConfig(embed_dim=32, num_heads=2, mixers="softmax"))
        >>> batch = {"tokens": torch.randint(256, (2, 20))}
        >>> simulate_quantization(model, [batch])(**batch).shape
        torch.Size([2, 20, 256])
    """
    weights = weights or Scheme(symmetric=True)
    activations = activations or Scheme(estimator="running")
    if activations.per_channel:
        raise ValueError("activations have one range a tensor: give per_channel=False")
    simulated = copy.deepcopy(model).eval()
    named = dict(simulated.named_modules())
    patterns, other = list(skip), dict(bits or {})
    for option, names in (("skip", patterns), ("bits", other)):
        for pattern in names:
            if not any(fnmatchcase(path, pattern) for path in named):
                raise ValueError(
                    f"{option} {pattern!r} matches no module; one is {list(named)[-1]!r}"
                )
    if tied_head and not any(isinstance(m, TiedHead) for m in named.values()):
        raise ValueError(
            f"{type(model).__name__} has no tied head of ours: an output matrix that is a linear "
            "layer is quantised unless skip names it"
        )
    replaced = 0
    for path, module in named.items():
        if not path or any(fnmatchcase(path, pattern) for pattern in patterns):
            continue
        own, out = weights, activations
        for count in (n for pattern, n in other.items() if fnmatchcase(path, pattern)):
            own, out = own.replace(bits=count), out.replace(bits=count)
        new: nn.Module | None = None
        if isinstance(module, nn.Embedding):
            new = QuantizedModule(module, own, None)
        elif _has_op(module):
            new = QuantizedModule(module, own, out)
        elif isinstance(module, TiedHead):
            new = QuantizedHead(own, out) if tied_head else None
        elif type(module) is nn.Identity and path.endswith("_tap"):
            new = ActivationQuantizer(out)
        if new is not None:
            simulated.set_submodule(path, new)
            replaced += 1
    if not replaced:
        raise ValueError(
            f"{type(model).__name__} has no Linear, LayerNorm or Embedding to quantise"
        )
    with torch.no_grad(), _estimating(simulated):
        seen = 0
        for batch in calibration:
            simulated(**batch)
            seen += 1
    if not seen:
        raise ValueError("the calibration holds no batches: give at least one")
    return simulated


def _has_op(module: nn.Module) -> bool:
    kinds = isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d)
    named = type(module).__name__ in ("Conv1D",) or type(module).__name__.endswith("RMSNorm")
    return (kinds or named) and isinstance(getattr(module, "weight", None), Tensor)


@contextmanager
def _estimating(model: nn.Module) -> Iterator[None]:
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.estimating = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.estimating = False
