"""Calibration: the scale of every activation, from batches that pass through the float model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.attention.mamba import MambaMixer
from manyheads.compress.quamba.hadamard import hadamard_split
from manyheads.compress.quamba.quantisers import MinMaxObserver, Observer, PercentileObserver
from manyheads.compress.quamba.sites import SITES, run_block
from manyheads.layers.ragged import check_mask, compact

__all__ = [
    "BlockObservers",
    "Scales",
    "calibrate",
    "calibrate_block",
    "mamba_blocks",
    "observe",
]

Scales = dict[str, Tensor]
"""A block's scales by site, each (1), float32."""

_log = logging.getLogger("manyheads")
_SAFE = 0.999  # below, what is clipped has been seen to ruin a model


def mamba_blocks(model: nn.Module) -> dict[str, MambaMixer]:
    """Return the Mamba blocks of a model by path, in order; not those quantised already.

    Raises:
        ValueError: there are none.
    """
    found = {p: m for p, m in model.named_modules() if type(m) is MambaMixer}
    if not found:
        raise ValueError(
            f"a {type(model).__name__} has no Mamba-1 block of ours in float: load a checkpoint "
            "into MambaForCausalLM (load_official), or name mamba among a MixerLM's mixers"
        )
    return found


class BlockObservers:
    """Observers of all sites of one block, and of those that a trick changes as without it."""

    def __init__(self, *, percentile: float | None, hadamard: bool) -> None:
        self.hadamard = hadamard
        self.sites: dict[str, Observer] = {name: MinMaxObserver() for name in SITES}
        if percentile is not None:
            self.sites["u"] = PercentileObserver(percentile)
        self.plain = {"u": MinMaxObserver(), "scan": MinMaxObserver()}

    def see(self, block: MambaMixer, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Run the block on its input and observe its real tokens; returns them by site."""
        front = None
        if mask is not None:
            moved = compact(mask)
            # What padding holds is nobody's business, not even if it is NaN.
            x, front = moved.gather(x).masked_fill(~moved.front[..., None], 0), moved.front
        seen = run_block(block, x, mask=front, hadamard=self.hadamard).seen
        if front is not None:
            seen = {name: t[front] for name, t in seen.items()}
        for name, observer in self.sites.items():
            observer.update(seen[name])
        for name, plain in self.plain.items():
            plain.update(seen[name])
        return seen

    def scales(self) -> Scales:
        return {name: observer.scale for name, observer in self.sites.items()}

    def without(self, *, percentile: bool, hadamard: bool) -> Scales:
        """Return the scales with the tricks that are True and without those that are not."""
        scales = self.scales()
        if not percentile:
            scales["u"] = self.plain["u"].scale
        if not hadamard:
            scales["y"] = self.plain["scan"].scale
        return scales


def check_percentile(percentile: float | None) -> None:
    """Warn of a percentile that is known to ruin models.

    Raises:
        ValueError: not in (0, 1].
    """
    if percentile is None:
        return
    PercentileObserver(percentile)
    if percentile < _SAFE:
        _log.warning(
            "percentile %g clips one input of the scan in %.0f: models have been seen to lose most "
            "of their accuracy that way; the published value is 0.99999",
            percentile, 1 / (1 - percentile),
        )  # fmt: skip


@torch.no_grad()
def calibrate_block(
    block: MambaMixer,
    batches: Iterable[Tensor],
    *,
    percentile: float | None = 0.99999,
    hadamard: bool = True,
) -> Scales:
    """Return the scales of one block from batches of its inputs, in their order.

    Args:
        block: in float, not rotated.
        batches: (B, N, C) each.
        percentile: quantile of |u| that sets its scale; None: the largest of all.
        hadamard: rotate the scan's output before it is observed.

    Raises:
        ValueError: a NaN in the calibration, no batch, or E has no rotation.
    """
    check_percentile(percentile)
    if hadamard:
        hadamard_split(block.config.inner_dim)
    observers = BlockObservers(percentile=percentile, hadamard=hadamard)
    for x in batches:
        observers.see(block, x, None)
    return observers.scales()


@torch.no_grad()
def observe(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    *,
    percentile: float | None,
    hadamard: bool,
    keep: int = 0,
) -> tuple[dict[str, BlockObservers], dict[str, list[Tensor]]]:
    """Return the observers of all Mamba blocks by path after the batches, and each block's inputs
    (real tokens of one row, (1, N, C)) in the first ``keep`` batches."""
    check_percentile(percentile)
    blocks = mamba_blocks(model)
    if hadamard:
        for block in blocks.values():
            hadamard_split(block.config.inner_dim)
    found = {p: BlockObservers(percentile=percentile, hadamard=hadamard) for p in blocks}
    kept: dict[str, list[Tensor]] = {p: [] for p in blocks}
    seen = 0

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            assert isinstance(module, MambaMixer)
            x = args[0] if args else kwargs["x"]
            mask = check_mask(kwargs.get("mask"), *x.shape[:2])
            try:
                found[path].see(module, x, mask)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            if seen < keep:
                kept[path].append(x[:1] if mask is None else x[:1, mask[0]])

        return hook

    handles = [b.register_forward_pre_hook(watch(p), with_kwargs=True) for p, b in blocks.items()]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            tokens, mask = tokens_of(batch)
            model(tokens, mask=mask)
            seen += 1
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if not seen:
        raise ValueError("the calibration has no batch: the scales of activations come from it")
    return found, kept


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    *,
    percentile: float | None = 0.99999,
    hadamard: bool = True,
) -> dict[str, Scales]:
    """Return the scales of all Mamba blocks of a model by path; the model is not changed.

    Order matters: the percentile is a moving average over batches, begun by the first.

    Args:
        model: holds `MambaMixer` blocks, in float.
        batches: tokens (B, N), or mappings with ``tokens`` or ``input_ids`` and, of padded ones,
            ``mask`` or ``attention_mask`` (True or 1 = a real token). Padding is not observed.
        percentile: quantile of |u| that sets its scale; None: the largest of all.
        hadamard: rotate each scan's output before it is observed.

    Raises:
        ValueError: no block, no batch, a NaN in an activation, a batch without tokens, or an inner
            width that has no rotation.

    Example:
        >>> model = MambaForCausalLM(MambaLMConfig(embed_dim=16, num_layers=1, vocab_size=32))
        >>> scales = calibrate(model, [torch.randint(32, (1, 20))])
        >>> sorted(scales["layers.0.mixer"])[:3]
        ['conv_in', 'dt', 'dt_low']
    """
    found, _ = observe(model, batches, percentile=percentile, hadamard=hadamard)
    return {path: observers.scales() for path, observers in found.items()}


def tokens_of(batch: Mapping[str, Tensor] | Tensor) -> tuple[Tensor, Tensor | None]:
    """Return tokens (B, N) and their mask or None.

    Raises:
        ValueError: a batch holds no tokens.
    """
    if isinstance(batch, Tensor):
        return batch, None
    for name, masked in (("tokens", "mask"), ("input_ids", "attention_mask")):
        if name in batch:
            mask = batch.get(masked)
            return batch[name], None if mask is None else mask.bool()
    raise ValueError(
        "a calibration batch needs tokens or input_ids, this one holds "
        f"{', '.join(batch) or 'nothing'}"
    )
