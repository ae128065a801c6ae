"""What ``train distil`` reads and makes once: token ids, and the teacher's sentence embeddings.

B batch, N padded length, C teacher width, r student width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyheads.compress.minilm.files import mean_pool
from manyheads.data.seeding import check_rank, generator
from manyheads.models.language.bert import BertEncoder
from manyheads.train.stop import StopRequest

__all__ = ["SentenceBatch", "SentenceBatches", "embed", "encode", "pad", "read_tokenizer"]

_EMBED_BATCH = 64


class SentenceBatch(NamedTuple):
    """Token ids (B, N), mask (B, N) and embeddings to reach (B, r), and the batch's step."""

    tokens: Tensor
    mask: Tensor
    target: Tensor
    step: Tensor


def read_tokenizer(folder: Path) -> Any:
    """Read ``tokenizer.json`` of a teacher's folder, without its padding and truncation.

    Raises:
        ValueError: there is none.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no tokenizer.json: teacher and student share it")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: Any, texts: tuple[str, ...], length: int) -> list[np.ndarray]:
    """Return the ids of texts; of longer ones the first and the last token of its own stay."""
    rows = (np.asarray(e.ids, dtype=np.int64) for e in tokenizer.encode_batch(list(texts)))
    return [r if len(r) <= length else np.append(r[: length - 1], r[-1]) for r in rows]


def pad(rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return ids (B, N) padded by 0 to the longest row, and the mask."""
    lengths = torch.tensor([len(r) for r in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.from_numpy(row)
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


@torch.no_grad()
def embed(
    model: BertEncoder,
    rows: list[np.ndarray],
    stop: StopRequest | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Return mean-pooled embeddings (len(rows), C), computed in batches of like lengths.

    ``progress`` is told how many rows are done.
    """
    device = next(model.parameters()).device
    out = torch.zeros(len(rows), model.config.hidden_size)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), _EMBED_BATCH):
        if stop is not None:
            stop.check()
        some = order[start : start + _EMBED_BATCH]
        tokens, mask = (t.to(device) for t in pad([rows[i] for i in some]))
        features = model(tokens, mask=mask).features
        out[some] = mean_pool(features, mask).float().cpu()
        if progress is not None:
            progress(start + len(some))
    return out


class SentenceBatches:
    """Endless batches of sentences of like lengths; batch k is a function of (seed, k, rank).

    Every epoch mixes the sentences anew, sorts them by length, cuts them into batches and mixes
    those; a last batch that is not full takes others too.
    """

    def __init__(
        self,
        rows: list[np.ndarray],
        targets: Tensor,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_rank(batch_size, rank, world_size)
        self.rows, self.targets, self.seed = rows, targets, seed
        self.lengths = np.array([len(r) for r in rows])
        self.batch_size = min(batch_size, len(rows))
        self.rank, self.world_size = rank, world_size
        self._epoch: tuple[int, np.ndarray] | None = None

    def batch(self, step: int) -> SentenceBatch:
        """Return batch ``step`` of this process."""
        count = -(-len(self.rows) // self.batch_size)
        epoch, place = divmod(step * self.world_size + self.rank, count)
        some = self._groups(epoch, count)[place]
        tokens, mask = pad([self.rows[i] for i in some])
        return SentenceBatch(tokens, mask, self.targets[torch.from_numpy(some)], torch.tensor(step))

    def _groups(self, epoch: int, count: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            mixed = generator(self.seed, epoch, 0).permutation(len(self.rows))
            order = mixed[np.argsort(self.lengths[mixed], kind="stable")]
            missing = count * self.batch_size - len(order)
            order = np.concatenate((order, order[:missing]))
            if missing:
                order = order[np.argsort(self.lengths[order], kind="stable")]
            groups = order.reshape(count, self.batch_size)
            self._epoch = epoch, groups[generator(self.seed, epoch, 1).permutation(count)]
        return self._epoch[1]
