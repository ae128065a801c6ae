"""Windows of a token stream: batches to train on, and every token once to measure on.

B batch, N window length, T tokens in the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor

from manyheads.data.seeding import check_rank, generator

__all__ = ["HeldOutWindows", "TokenBatch", "TokenBatches"]


class TokenBatch(NamedTuple):
    """Windows of text and the tokens that follow: ``targets[b, n]`` comes after ``inputs[b, n]``.

    Attributes:
        inputs: (B, N) int64.
        targets: (B, N) int64; -100 is not scored.
        mask: (B, N) bool, True = a real token; None when all are.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None = None


class TokenBatches:
    """Endless training batches; batch k is a pure function of (seed, k, rank, world_size).

    An epoch is a run through windows that tile the stream without overlap, in random order and
    from a random first token, so the borders fall elsewhere each time (the tiling leaves out less
    than two windows' length, another part each epoch). The order does not depend on how the batch
    is dealt: two processes with batch 4 see the windows of one process with batch 8.

    Args:
        tokens: (T,) of any integer type; kept as it is, only windows become int64.
        length: N.
        batch_size: B of this process.
        seed: of the order.
        rank, world_size: which process this is, of how many.

    Raises:
        ValueError: fewer than N + 1 tokens, a length or batch below 1, a rank out of range.

    Example:
        >>> batches = TokenBatches(torch.arange(100), length=8, batch_size=4)
        >>> inputs, targets, _ = batches.batch(3)
        >>> bool((targets == inputs + 1).all())
        True
    """

    def __init__(
        self,
        tokens: Tensor,
        *,
        length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_tokens(tokens, length, least=length + 1)
        check_rank(batch_size, rank, world_size)
        self.tokens, self.length, self.batch_size = tokens, length, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.step = 0
        targets = len(tokens) - 1
        self.windows = max(targets // length - 1, 1)
        self._slack = targets - self.windows * length
        self._epochs: dict[int, Tensor] = {}

    @property
    def steps_per_epoch(self) -> float:
        """Batches, over all processes, that an epoch takes."""
        return self.windows / (self.batch_size * self.world_size)

    def batch(self, step: int) -> TokenBatch:
        """Return batch ``step`` of this process."""
        if step < 0:
            raise ValueError(f"step is {step}: give 0 or more")
        first = (step * self.world_size + self.rank) * self.batch_size
        starts = [self._start(n) for n in range(first, first + self.batch_size)]
        windows = _gather(self.tokens, torch.tensor(starts), self.length + 1)
        return TokenBatch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def _start(self, number: int) -> int:
        epoch, place = divmod(number, self.windows)
        if epoch not in self._epochs:
            rng = generator(self.seed, epoch)
            offset = int(rng.integers(self._slack + 1))
            order = torch.from_numpy(rng.permutation(self.windows))
            # A batch touches at most two epochs unless the text is tiny: keep the last few.
            while len(self._epochs) > 3:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = offset + order * self.length
        return int(self._epochs[epoch][place])

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TokenBatch:
        batch = self.batch(self.step)
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return all that the coming batches depend on beside the arguments."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        if state["seed"] != self.seed:
            self._epochs.clear()
        self.seed, self.step = int(state["seed"]), int(state["step"])


class HeldOutWindows:
    """Every token of a held-out text but the first, scored exactly once.

    The last window is as short as what is left, padded on the right (mask False, target -100), and
    the last batch as small: nothing is dropped. Windows are dealt to the ranks in turn, so sums of
    losses and counts, not means, are what to add up over batches and ranks.

    Args:
        tokens: (T,) of any integer type.
        length: N.
        batch_size: B of this process.
        context: tokens at the front of every window but the first that were scored by the window
            before and only give context now; 0 is the cheapest, N - 1 the strictest.
        rank, world_size: which process this is, of how many.

    Raises:
        ValueError: fewer than 2 tokens, a length or batch below 1, a context outside [0, N).
    """

    def __init__(
        self,
        tokens: Tensor,
        *,
        length: int,
        batch_size: int,
        context: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_tokens(tokens, length, least=2)
        check_rank(batch_size, rank, world_size)
        if not 0 <= context < length:
            raise ValueError(f"context {context} is not in [0, {length}), the window length")
        self.tokens, self.length, self.context = tokens, length, context
        self.batch_size = batch_size
        stride = length - context
        rest = max(len(tokens) - 1 - length, 0)
        windows = 1 + -(-rest // stride)
        self._starts = [w * stride for w in range(rank, windows, world_size)]

    def __len__(self) -> int:
        return -(-len(self._starts) // self.batch_size)

    def __iter__(self) -> Iterator[TokenBatch]:
        for i in range(0, len(self._starts), self.batch_size):
            yield self._batch(torch.tensor(self._starts[i : i + self.batch_size]))

    def _batch(self, starts: Tensor) -> TokenBatch:
        windows = _gather(self.tokens, starts, self.length + 1)
        place = torch.arange(self.length)
        mask = starts[:, None] + place < len(self.tokens) - 1  # (B, N)
        seen = (starts[:, None] > 0) & (place < self.context)
        inputs = windows[:, :-1].masked_fill(~mask, 0)
        targets = windows[:, 1:].masked_fill(~mask | seen, -100)
        return TokenBatch(inputs, targets, mask)


def _check_tokens(tokens: Tensor, length: int, *, least: int) -> None:
    if tokens.ndim != 1 or tokens.is_floating_point():
        raise ValueError(
            f"tokens of {tokens.dtype} and shape {tuple(tokens.shape)}: give integer ids (T,)"
        )
    if length < 1:
        raise ValueError(f"length is {length}: give at least 1")
    if len(tokens) < least:
        raise ValueError(
            f"{len(tokens)} tokens are too few for a window of length {length}, which needs "
            f"{least}: give more text or a shorter length"
        )


def _gather(tokens: Tensor, starts: Tensor, size: int) -> Tensor:
    index = starts[:, None] + torch.arange(size)
    return tokens[index.clamp_max(len(tokens) - 1)].long()
