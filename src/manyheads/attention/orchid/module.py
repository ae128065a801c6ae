"""The Orchid layer. B batch, N length, C embed_dim, F bins of the spectrum."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from manyheads.attention.orchid.conditioning import pad_length
from manyheads.attention.orchid.config import OrchidConfig
from manyheads.attention.orchid.network import ConditioningNetwork, ShortFilter, StaticFilter
from manyheads.layers.fourier import transform_pair
from manyheads.layers.keymap import Entry, KeyMap, rename, tied
from manyheads.layers.mixer import SequenceMixer
from manyheads.layers.ragged import check_mask, map_lengths, map_packed
from manyheads.layers.taps import shifted_sum

__all__ = ["OrchidAttention"]

_CACHED_LENGTHS = 8


class OrchidAttention(SequenceMixer):
    """Data-dependent global convolution between two gates (2402.18508). Not causal: looks ahead.

    Needs training. Kernels are made from the input by a small network, plus a static one, which
    is computed once for each length in eval mode without gradients.

    Example:
        >>> layer = OrchidAttention(OrchidConfig(embed_dim=64))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    mechanism: ClassVar[str] = "orchid"
    config: OrchidConfig

    def __init__(self, config: OrchidConfig) -> None:
        super().__init__()
        self.config = c = config
        self.forward_transform, self.inverse_transform = transform_pair(c.transform, c.norm)
        self.in_proj = nn.Linear(c.embed_dim, 3 * c.embed_dim)
        self.short_conv = ShortFilter(3 * c.embed_dim, c.short_conv)
        self.conditioning = ConditioningNetwork(c)
        self.static = StaticFilter(c)
        self.residual = StaticFilter(c) if c.residual_conv else None
        self.out_proj = nn.Linear(c.embed_dim, c.embed_dim)
        self._cache: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor | None]] = {}
        self._cached_versions: list[tuple[int, int, torch.dtype]] = []
        self._cached_tensors: list[Tensor] = []

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Mix whole sequences; see :class:`~manyheads.layers.mixer.SequenceMixer`.

        Rows of different lengths are computed one length at a time, each on a circle of its own
        length: nothing of the padding takes part.

        Args:
            x: (B, N, C).
            mask: (B, N), True = a real token.
            cu_seqlens: (S + 1) borders of packed sequences, with B = 1.
            context: (B, N, C), another sequence that the kernel is made from (``x`` if None).

        Raises:
            ValueError: longer than max_length, or a context of another shape.
        """
        mask = check_mask(mask, x.shape[0], x.shape[1])
        if context is not None and context.shape != x.shape:
            raise ValueError(
                f"context has shape {tuple(context.shape)}, the input {tuple(x.shape)}: kernel "
                "and sequence need one length; resample the context"
            )
        if cu_seqlens is not None:
            if mask is not None:
                raise ValueError("give mask or cu_seqlens, not both: packed tokens are all real")
            (out,) = map_packed(
                lambda a, b, m: map_lengths(self._mix, (a, b), m, dim=1),
                (x, context),
                cu_seqlens,
                dim=1,
            )
            return out
        if mask is not None:
            return map_lengths(self._mix, (x, context), mask, dim=1)
        return self._mix(x, context)

    def static_kernel(self, length: int) -> Tensor:
        """Return the taps of the static kernel, (1, N, C)."""
        return self.static(length)

    def adaptive_kernel(self, x: Tensor) -> Tensor:
        """Return the kernel that (B, N, C) makes: (B, C, N) taps if two_sided, else a spectrum.

        The spectrum is (B, C, N // 2 + 1), complex, for the Fourier transform, and (B, C, N) for
        the cosine transforms; in the layer's ``norm``.
        """
        u = self._conditioned(x)
        with torch.autocast(x.device.type, enabled=False):
            spectrum = self.conditioning(self._wide(u))
            if self.config.two_sided:
                return self.conditioning.kernel_taps(spectrum, x.shape[1])
            return spectrum

    def train(self, mode: bool = True) -> OrchidAttention:
        self._cache.clear()
        self._cached_versions, self._cached_tensors = [], []
        super().train(mode)
        return self

    def _conditioned(self, x: Tensor) -> Tensor:
        c = self.config.embed_dim
        bias = self.in_proj.bias[2 * c :]
        return nn.functional.linear(x, self.in_proj.weight[2 * c :], bias)

    @staticmethod
    def _wide(x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _mix(self, x: Tensor, context: Tensor | None) -> Tensor:
        u = self.in_proj(x)
        source = u[..., 2 * self.config.embed_dim :]
        if context is not None:
            source = self._conditioned(context)
        with torch.autocast(x.device.type, enabled=False):
            y = self._convolve(self._wide(u), self._wide(source), self._wide(x))
        return self.out_proj(y.to(u.dtype))

    def _convolve(self, u: Tensor, source: Tensor, x: Tensor) -> Tensor:
        n = u.shape[1]
        static, residual = self._static_spectra(n, u)
        spectrum = self.conditioning(source)
        if self.config.two_sided:
            taps = self.conditioning.kernel_taps(spectrum, n)
            spectrum = self.forward_transform(taps, n)
        after, before, value = self._short(u)
        y = self._circulate(value * before, static + spectrum, self.static.bias) * after
        if self.residual is not None:
            assert residual is not None
            y = y + self._circulate(x, residual, self.residual.bias)
        return y

    def _short(self, u: Tensor) -> tuple[Tensor, ...]:
        """Convolve all 3C channels with the tokens before, and cut the result into three."""
        weight, bias = self.short_conv.weight, self.short_conv.bias
        padded = pad_length(u, weight.shape[-1] - 1, 0)
        y = shifted_sum(padded, weight[:, 0].to(u.dtype))
        if bias is not None:
            y = y + bias.to(u.dtype)
        return y.chunk(3, -1)

    def _circulate(self, x: Tensor, spectrum: Tensor, bias: Tensor) -> Tensor:
        n = x.shape[1]
        y = self.inverse_transform(self.forward_transform(x.mT, n) * spectrum, n)
        return torch.addcmul(y.mT, x, bias.to(x.dtype))

    def _static_spectra(self, length: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the spectra (C, F) of both static filters, out of the cache where they can be."""
        fresh = (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or any(p.is_inference() for p in self.parameters())
        )
        if fresh:
            return self._compute_static(length, like)
        filters = [f for f in (self.static, self.residual) if f is not None]
        tensors = [t for f in filters for t in (*f.parameters(), *f.buffers())]
        versions = [(t.data_ptr(), t._version, t.dtype) for t in tensors]
        if versions != self._cached_versions:
            self._cache.clear()
            # Held, so that no other weights can come to stand at these addresses.
            self._cached_tensors = [t.detach() for t in tensors]
            self._cached_versions = versions
        key = (length, like.dtype)
        if key not in self._cache:
            if len(self._cache) >= _CACHED_LENGTHS:
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = self._compute_static(length, like)
        return self._cache[key]

    def _compute_static(self, length: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        first, second = (
            None if f is None else self.forward_transform(f(length)[0].to(like.dtype).mT, length)
            for f in (self.static, self.residual)
        )
        assert first is not None
        return first, second

    def key_map(self) -> KeyMap:
        """Names of the official stand-alone operator."""
        kinds = ("weight", "bias")
        return KeyMap(
            *(rename(f"in_proj.{k}", f"in_linear.{k}") for k in kinds),
            *(rename(f"short_conv.{k}", f"conv1d_short.{k}") for k in kinds),
            *self._filter_map("static", "fixed_conv"),
            *self._filter_map("residual", "fixed_conv_res"),
            *(
                rename(
                    f"conditioning.{ours}.convs.{{}}.{k}",
                    f"conv_kernel_nn.{theirs}.conv1d_ls.{{}}.{k}",
                )
                for ours, theirs in self._stacks()
                for k in kinds
            ),
            *(
                rename(
                    f"conditioning.{ours}.norms.{{}}.{k}",
                    f"conv_kernel_nn.{theirs}.norm_ls.{{}}.norm_conv_kernel.{k}",
                )
                for ours, theirs in self._stacks()
                for k in (*kinds, "running_mean", "running_var", "num_batches_tracked")
            ),
            *(rename(f"out_proj.{k}", f"out_linear.{k}") for k in kinds),
        )

    def _stacks(self) -> tuple[tuple[str, str], ...]:
        c = self.config
        if c.conditioning == "type2":
            return ("key", "nn_model_k"), ("query", "nn_model_q"), ("frequency", "nn_model_frq")
        if c.domains == "frequency":
            return (("frequency", "nn_model"),)
        return ("time", "nn_model"), ("frequency", "nn_model2")

    def _filter_map(self, ours: str, theirs: str) -> list[Entry]:
        # One module of sines stands behind every hidden layer, so its frequency is listed often.
        count = self.config.filter_layers + 1
        mlp = f"{theirs}.implicit_filter"
        return [
            rename(f"{ours}.bias", f"{theirs}.bias"),
            *(rename(f"{ours}.{n}", f"{theirs}.pos_emb.{n}") for n in ("z", "t")),
            *(
                rename(f"{ours}.layers.{i}.{k}", f"{mlp}.{2 * i}.{k}")
                for i in range(count)
                for k in ("weight", "bias")
            ),
            rename(f"{ours}.frequency", f"{mlp}.1.freq"),
            *(tied(f"{ours}.frequency", f"{mlp}.{2 * i + 1}.freq") for i in range(1, count)),
            rename(f"{ours}.out.weight", f"{mlp}.{2 * count}.weight"),
            rename(f"{ours}.deltas", f"{theirs}.modulation.deltas"),
        ]
