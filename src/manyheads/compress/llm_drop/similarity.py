"""How much each branch of a model changes the residual stream, in one streaming pass.

Similarity of a branch: the cosine of the stream before and after it, per token, in float32,
averaged over all real tokens. Sums alone are kept, and of one batch the stream between blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.compress.anatomy import Anatomy, Sublayer, anatomy
from manyheads.models.language.mixer_encoder import turned

__all__ = ["BlockMasks", "Similarities", "measure_similarities", "real_tokens"]


@dataclass(frozen=True, kw_only=True)
class Similarities:
    """Mean cosines, 1 where a branch changes nothing.

    Attributes:
        branches: by kind, then by the block's path.
        blocks: of a block's input and output, by the block's path.
        consecutive: by stack, (L, L): entry [i, g - 1] compares the inputs of blocks i and i + g
            (of the stack's output for i + g = L); -inf beyond the end. Empty unless asked for.
        tokens: real tokens that were seen, by stack.
    """

    branches: dict[str, dict[str, float]]
    blocks: dict[str, float]
    consecutive: dict[str, Tensor]
    tokens: dict[str, int]


class _Mean:
    """A running mean of cosines; a NaN is told from a model that was never run."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, before: Tensor, after: Tensor, mask: Tensor | None) -> None:
        cosines = _cosine(before, after, mask)
        self.total += float(cosines.double().sum())
        self.count += cosines.numel()

    @property
    def value(self) -> float:
        return self.total / max(1, self.count)


def measure_similarities(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    parts: Anatomy | None = None,
    norm_as_unit: bool = True,
    consecutive: bool = False,
) -> Similarities:
    """Run the model over calibration batches once and measure every branch and block.

    Args:
        model: put in eval mode for the pass and back after it.
        batches: each is given to ``model(**batch)``; an ``attention_mask`` (or ``mask``,
            ``decoder_attention_mask``) excludes padding from the means.
        parts: the model's anatomy, where it is known already.
        norm_as_unit: compare the stream before and after the branch; False: the norm's output and
            the branch's own output, without the residual (an ablation of the paper; worse).
        consecutive: measure all pairs of block inputs as well; costs L + 1 streams of one batch.

    Raises:
        ValueError: there are no batches, a similarity is not a number, or ``norm_as_unit=False``
            for a model whose norms come after the sums.
    """
    parts = parts or anatomy(model)
    if not norm_as_unit and any(s.post_norm for _, s in parts.sublayers()):
        raise ValueError(
            "norm_as_unit=False compares a norm's output with its branch's: the norms of "
            f"{type(model).__name__} come after the sums, so leave it True"
        )
    recorder = _Recorder(model, parts, norm_as_unit=norm_as_unit, consecutive=consecutive)
    training = model.training
    model.eval()
    seen = 0
    try:
        with torch.no_grad(), recorder:
            for batch in batches:
                recorder.begin(batch)
                model(**batch)
                recorder.end_batch()
                seen += 1
    finally:
        model.train(training)
    if not seen:
        raise ValueError("the calibration holds no batches: give at least one")
    return recorder.result()


def real_tokens(batch: Mapping[str, Any], role: str, tokens: int) -> Tensor | None:
    """Return the mask (tokens,) of a batch's real tokens on one side, None where all are real."""
    names = ["decoder_attention_mask"] if role == "decoder" else []
    for name in (*names, "attention_mask", "mask"):
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == tokens:
            return mask.reshape(-1).bool()
    return None


class BlockMasks(ExitStack):
    """Which tokens are real, in the order in which the block that runs has them.

    A batch says it for the model's inputs; some layers of a MixerEncoder read from the end.
    """

    def __init__(self, model: nn.Module, parts: Anatomy) -> None:
        super().__init__()
        self._batch: Mapping[str, Any] = {}
        for block in parts.blocks:
            if block.family == "manyheads":
                module = model.get_submodule(block.path)
                handle = module.register_forward_pre_hook(self._see, with_kwargs=True)
                self.callback(handle.remove)

    def begin(self, batch: Mapping[str, Any]) -> None:
        self._batch = batch

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._batch = {"mask": args[1] if len(args) > 1 else kwargs.get("mask")}

    def real(self, role: str, tokens: int) -> Tensor | None:
        """Return the mask (tokens,) of real tokens, None where all are."""
        return real_tokens(self._batch, role, tokens)


def _cosine(before: Tensor, after: Tensor, mask: Tensor | None) -> Tensor:
    before, after = _rows(before), _rows(after)
    if mask is not None:
        before, after = before[mask], after[mask]
    return F.cosine_similarity(before, after, dim=-1, eps=1e-8)


def _turned_back(
    before: Tensor, after: Tensor, mask: Tensor | None, borders: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return streams and mask of a block that reads from the end, in the model's own order."""
    order = turned(before.shape[1], borders[0] if borders else None, before.device)
    real = None if mask is None else mask.view(before.shape[:2])[:, order].reshape(-1)
    return before[:, order], after[:, order], real


def _rows(stream: Tensor) -> Tensor:
    return stream.detach().reshape(-1, stream.shape[-1]).float()


def _tensor(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = value[0]
    return value


class _Recorder(ExitStack):
    """Hooks on where branches begin and blocks end."""

    def __init__(
        self, model: nn.Module, parts: Anatomy, *, norm_as_unit: bool, consecutive: bool
    ) -> None:
        super().__init__()
        self._parts, self._unit, self._pairs = parts, norm_as_unit, consecutive
        self._branches: dict[tuple[str, str], _Mean] = {}
        self._blocks = {b.path: _Mean() for b in parts.blocks}
        self._grams: dict[str, Tensor] = {}
        self._tokens = dict.fromkeys(parts.stacks, 0)
        self._masks = self.enter_context(BlockMasks(model, parts))
        self._stream: dict[str, Tensor] = {}
        self._boundaries: dict[str, list[Tensor]] = {}
        for block in parts.blocks:
            module = model.get_submodule(block.path)
            self._before(module, block.path)
            self._hook(module.register_forward_hook(self._leaving(block)))
            for place, sublayer in enumerate(block.sublayers):
                key = (sublayer.kind, block.path)
                self._branches[key] = _Mean()
                if norm_as_unit:
                    enter = model.get_submodule(sublayer.enter)
                    name = f"{block.path}#{place}"
                    self._before(enter, name)
                else:
                    self._watch_alone(model, block.role, sublayer, key)

    def _hook(self, handle: Any) -> None:
        self.callback(handle.remove)

    def _before(self, module: nn.Module, name: str) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._stream[name] = _tensor(args[0] if args else kwargs["hidden_states"])

        self._hook(module.register_forward_pre_hook(hook, with_kwargs=True))

    def begin(self, batch: Mapping[str, Any]) -> None:
        self._masks.begin(batch)
        self._boundaries = {stack: [] for stack in self._parts.stacks}

    def end_batch(self) -> None:
        if not self._pairs:
            return
        for stack, streams in self._boundaries.items():
            if streams:
                unit = torch.stack([F.normalize(s, dim=-1, eps=1e-8) for s in streams])
                gram = torch.einsum("itd,jtd->ij", unit, unit).double()
                self._grams[stack] = self._grams.get(stack, torch.zeros_like(gram)) + gram

    def _leaving(self, block: Any) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            before, after = self._stream.pop(block.path), _tensor(output)
            mask = self._masks.real(block.role, before.numel() // before.shape[-1])
            self._blocks[block.path].add(before, after, mask)
            if self._unit:
                places = range(len(block.sublayers))
                streams = [self._stream.pop(f"{block.path}#{p}") for p in places] + [after]
                for place, sublayer in enumerate(block.sublayers):
                    mean = self._branches[sublayer.kind, block.path]
                    mean.add(streams[place], streams[place + 1], mask)
            if self._pairs:
                streams = self._boundaries[block.stack]
                if getattr(module, "backwards", False):
                    before, after, mask = _turned_back(before, after, mask, args[2:])
                for stream in (before, after)[len(streams) > 0 :]:
                    rows = _rows(stream)
                    streams.append(rows if mask is None else rows[mask])

        return hook

    def _watch_alone(
        self, model: nn.Module, role: str, sublayer: Sublayer, key: tuple[str, str]
    ) -> None:
        norm, module = (model.get_submodule(p) for p in (sublayer.norms[0], sublayer.path))
        name = f"{key[1]}#{key[0]}"

        def normed(_: nn.Module, args: Any, output: Tensor) -> None:
            self._stream[name] = output

        def done(_: nn.Module, args: Any, output: Any) -> None:
            before = self._stream.pop(name)
            mask = self._masks.real(role, before.numel() // before.shape[-1])
            self._branches[key].add(before, _tensor(output), mask)

        self._hook(norm.register_forward_hook(normed))
        self._hook(module.register_forward_hook(done))

    def result(self) -> Similarities:
        branches: dict[str, dict[str, float]] = {}
        for (kind, path), mean in self._branches.items():
            branches.setdefault(kind, {})[path] = mean.value
        blocks = {path: mean.value for path, mean in self._blocks.items()}
        for path, value in [*blocks.items(), *(p for b in branches.values() for p in b.items())]:
            if value != value:
                raise ValueError(
                    f"the similarity at {path!r} is not a number: the model gives NaN or infinity "
                    "on the calibration (look at its precision and its inputs)"
                )
        counts = {b.stack: self._blocks[b.path].count for b in self._parts.blocks}
        return Similarities(
            branches=branches,
            blocks=blocks,
            consecutive={s: _gaps(g / max(1, counts[s])) for s, g in self._grams.items()},
            tokens=counts,
        )


def _gaps(gram: Tensor) -> Tensor:
    """Return [i, g - 1] = gram[i, i + g] of an (L + 1, L + 1) matrix, -inf beyond its end."""
    layers = gram.shape[0] - 1
    out = torch.full((layers, layers), float("-inf"), dtype=torch.float64)
    for i in range(layers):
        out[i, : layers - i] = gram[i, i + 1 :]
    return out
