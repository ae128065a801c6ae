"""Sizes and options of an Orchid layer, and how the official arguments read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from manyheads.attention.orchid.conditioning import PADDINGS, Padding
from manyheads.attention.orchid.op import refuse_causal
from manyheads.config import Config
from manyheads.errors import nearest, unknown_name
from manyheads.layers.activations import activation
from manyheads.layers.fourier import Norm, Transform, transform_pair

__all__ = ["SIGMAS", "OrchidConfig"]

Conditioning = Literal["type1", "type2", "phase"]
Domains = Literal["both", "time", "frequency"]
KernelNorm = Literal["layer", "batch", "none"]
SIGMAS = ("identity", "tanh", "sigmoid", "gelu", "relu", "silu", "softshrink")


@dataclass(frozen=True, kw_only=True, slots=True)
class OrchidConfig(Config):
    """Sizes and options of an Orchid layer.

    Attributes:
        embed_dim: C.
        num_heads: changes nothing, every channel is mixed by itself; kept so that all mixers are
            configured alike.
        is_causal: always False; kept for the same reason.
        max_length: the static filter has a row of position features for each of so many places.
        conditioning: "type1" (magnitude of the spectrum), "type2" (cross-correlation) or "phase"
            (the spectrum itself, which does not commute with shifts; an ablation).
        domains: short convolutions in time, over frequencies or, better, "both". Type II keeps
            the ones in time that make its two sequences.
        kernel_size: odd, taps of the short convolutions that make the kernel.
        kernel_layers: convolutions in each domain, with ``kernel_activation`` between them.
        kernel_activation: an activation by name.
        kernel_bias: whether those convolutions have biases.
        kernel_norm: after each of them, "layer" (over channels), "batch" or "none".
        padding: at the ends in time: "circular" keeps equivariance to shifts exact, "zeros" and
            "reflect" are the official ones (reflect over frequencies too).
        sigma: on the second spectrum of type II: identity (best), tanh, sigmoid, gelu, relu, silu
            or softshrink, with ``sigma_threshold``.
        sigma_on_magnitude: on its magnitude, keeping the phase, instead of on both parts.
        transform: "fft", "dct" (cosine transform II; products of those are no circular
            convolutions) or "dct1".
        norm: scaling of the transform, see :func:`manyheads.attention.circular_conv`.
        two_sided: the kernel is made at length 2N, and its first N taps in time are used, as the
            official code does unless told otherwise (there the option is called causal, which
            it is not). Not for type II.
        short_conv: width of the convolution in front of the gates; it reads earlier tokens.
        residual_conv: whether a static long convolution of the input is added.
        filter_width, filter_layers, filter_features: of the MLP that makes a static filter:
            hidden width, hidden layers after the first, position features (odd, 3 or more).
        filter_frequency: initial frequency of its sines; ``filter_frequency_scale`` a constant
            factor.
        filter_decay: whether filters decay with the distance, from ``decay_floor`` up to 1.
        decay_floor: added to the decay.
        learn_positions: whether the position features are trained (they are, slowly, officially).
        parity: type I takes the squared magnitude, and frequency convolutions of two parts mix
            neighbours in the list of all real and then all imaginary parts, as the official code
            does. False: as the paper's formulas say.
    """

    embed_dim: int
    num_heads: int = 1
    is_causal: bool = False
    max_length: int = 1024
    conditioning: Conditioning = "type1"
    domains: Domains = "both"
    kernel_size: int = 3
    kernel_layers: int = 1
    kernel_activation: str = "gelu"
    kernel_bias: bool = True
    kernel_norm: KernelNorm = "layer"
    padding: Padding = "circular"
    sigma: str = "identity"
    sigma_on_magnitude: bool = False
    sigma_threshold: float = 0.5
    transform: Transform = "fft"
    norm: Norm = "backward"
    two_sided: bool = False
    short_conv: int = 3
    residual_conv: bool = True
    filter_width: int = 64
    filter_layers: int = 1
    filter_features: int = 33
    filter_frequency: float = 10.0
    filter_frequency_scale: float = 1.0
    filter_decay: bool = True
    decay_floor: float = 0.0
    learn_positions: bool = True
    parity: bool = False

    def __post_init__(self) -> None:
        refuse_causal(self.is_causal)
        for what, value, known in (
            ("conditioning", self.conditioning, ("type1", "type2", "phase")),
            ("domains", self.domains, ("both", "time", "frequency")),
            ("kernel_norm", self.kernel_norm, ("layer", "batch", "none")),
            ("padding", self.padding, PADDINGS),
            ("sigma", self.sigma, SIGMAS),
        ):
            if value not in known:
                raise unknown_name(what, value, known)
        transform_pair(self.transform, self.norm)
        activation(self.kernel_activation)
        if self.filter_features < 3 or self.filter_features % 2 == 0:
            raise ValueError(
                f"filter_features {self.filter_features} must be odd and 3 or more: one for the "
                "time, and a sine and a cosine for each band"
            )
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} must be odd")
        for name in ("short_conv", "kernel_layers", "max_length", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.two_sided and self.conditioning == "type2":
            raise ValueError("two_sided=True is not possible with type2: use two_sided=False")
        if self.two_sided and self.domains == "time" and self.conditioning == "phase":
            raise ValueError("two_sided=True keeps no phase here: use domains='both'")

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> OrchidConfig:
        """Read the arguments of the official OrchidOperator, with ``parity`` on.

        Raises:
            ValueError: a key is unknown, or asks for what the official code cannot run.
        """
        known = [*_NAMES, *_FIXED, *_NO_EFFECT, "dxt", "conv_kernel", "residual_long_conv",
                 "causal", "lr_pos_emb"]  # fmt: skip
        _check(official, known)
        kernel = dict(official.get("conv_kernel", {}))
        _check(kernel, [*_KERNEL_NAMES, "type", "nn", "norm", "actq", "wd", "lr"])
        values = {ours: official[k] for k, ours in _NAMES.items() if k in official}
        values |= {ours: kernel[k] for k, ours in _KERNEL_NAMES.items() if k in kernel}
        dxt = official.get("dxt", "fft")
        transform, norm = _transform(dxt if isinstance(dxt, str) else dxt[0])
        kinds = {"absfreq": "type1", "corrTime": "type2", "freq": "phase"}
        domains = {"convtf": "both", "convt": "time", "convf": "frequency"}
        domains |= {f"conv2{k[4:]}": v for k, v in domains.items()}
        norms = {"layernorm": "layer", "batchnorm": "batch", "none": "none"}
        kind = _pick("conv_kernel.type", kernel.get("type", "absfreq"), kinds)
        two_sided = official.get("causal", True)
        if kind == "type2" and transform != "fft":
            two_sided = False  # without effect there
        sigma, _, rest = kernel.get("actq", "id").partition("_")
        sigma, _, threshold = sigma.partition("+")
        values |= {
            "conditioning": kind,
            "domains": _pick("conv_kernel.nn", kernel.get("nn", "convtf"), domains),
            "kernel_norm": _pick("conv_kernel.norm", kernel.get("norm", "layernorm"), norms),
            "sigma": "identity" if sigma in ("id", "linear") else sigma,
            "sigma_on_magnitude": rest == "abs",
            "transform": transform,
            "norm": norm,
            "two_sided": two_sided,
            "residual_conv": official.get("residual_long_conv", "sconv") == "sconv",
            "learn_positions": official.get("lr_pos_emb", 1e-5) != 0,
            "parity": True,
        }
        if threshold:
            values["sigma_threshold"] = float(threshold)
        if values.get("kernel_activation") in ("id", "linear"):
            values["kernel_activation"] = "identity"
        defaults = {"max_length": 128, "filter_width": 64, "filter_features": 3,
                    "filter_frequency": 1.0, "filter_layers": 2, "padding": "zeros"}  # fmt: skip
        return cls.from_dict(defaults | values)


_NAMES = {
    "d_model": "embed_dim",
    "l_max": "max_length",
    "filter_order": "filter_width",
    "short_filter_order": "short_conv",
    "emb_dim": "filter_features",
    "num_inner_mlps": "filter_layers",
    "w": "filter_frequency",
    "w_mod": "filter_frequency_scale",
    "modulate": "filter_decay",
    "shift": "decay_floor",
}
_KERNEL_NAMES = {
    "conv_filter_size": "kernel_size",
    "padding_mode": "padding",
    "n_layer": "kernel_layers",
    "activation": "kernel_activation",
    "bias": "kernel_bias",
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "order": (2,), "num_heads": (1,), "chain": ("*-c-*", "*c*"), "normalized": (False,),
    "linear_mixer": (False,), "bidirectional": (False,),
}  # fmt: skip
_NO_EFFECT = {"wd", "lr", "filter_dropout", "actchain", "batch", "seq"}


def _check(official: Mapping[str, Any], known: list[str]) -> None:
    for key, value in official.items():
        if key not in known:
            raise ValueError(f"unknown key {key!r} in an official config{nearest(key, known)}")
        if key in _FIXED and value not in _FIXED[key]:
            raise ValueError(f"{key}={value!r} is not supported: only {_FIXED[key]}")


def _pick(what: str, value: str, table: Mapping[str, str]) -> str:
    if value not in table:
        raise unknown_name(what, value, table)
    return table[value]


def _transform(name: str) -> tuple[str, str]:
    """Return our transform and scaling of an official name, fft-o or dctxd-o."""
    kind, _, ortho = name.partition("-")
    table = {"fft": "fft", "dct": "dct", "dct2": "dct", "dct1": "dct1"}
    table |= {f"dctx{k}": "dct" for k in ("", "1", "2", "4", "d")}
    ours = _pick("dxt", kind, table)
    if ours == "fft":
        return "fft", "ortho" if ortho else "forward"
    return ours, "ortho" if ortho and kind in ("dctx2", "dctxd") else "backward"
