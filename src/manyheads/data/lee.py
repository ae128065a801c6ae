"""The Lee documents: 50 short news items, how alike people find them, and 300 others.

"An empirical evaluation of models of text document similarity", M. D. Lee, B. Pincombe and
M. Welsh, 2005. The files lie in gensim's tests.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyheads.data.packages import package_folder

__all__ = ["LeeDocuments", "load_lee", "spearman"]

_DOCUMENTS = 50


class LeeDocuments(NamedTuple):
    """Documents and judgements.

    Attributes:
        documents: the 50 that were judged.
        similarity: (50, 50) float64, mean judgement from 0 to 1, symmetric, 1 on the diagonal.
        background: the 300 others, which nobody judged.
    """

    documents: tuple[str, ...]
    similarity: Tensor
    background: tuple[str, ...]

    def correlation(self, embeddings: Tensor) -> float:
        """Return Spearman's correlation of cosines with the 1,225 judged pairs.

        Args:
            embeddings: (50, C) of the documents, of any length.

        Raises:
            ValueError: another number of documents.
        """
        if embeddings.ndim != 2 or len(embeddings) != len(self.documents):
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)}, expected ({_DOCUMENTS}, C)"
            )
        unit = torch.nn.functional.normalize(embeddings.double(), dim=-1)
        rows, columns = torch.triu_indices(_DOCUMENTS, _DOCUMENTS, offset=1)
        return spearman((unit @ unit.mT)[rows, columns], self.similarity[rows, columns])


def load_lee() -> LeeDocuments:
    """Read the documents and the judgements out of the package gensim.

    Raises:
        MissingExtraError: gensim is not installed.

    Example:
        >>> lee = load_lee()
        >>> len(lee.documents), len(lee.background), lee.similarity.shape
        (50, 300, torch.Size([50, 50]))
    """
    # Its files are read; the package itself is not run.
    package = package_folder("gensim", "'manyheads[data]'", "the Lee documents")
    folder = package / "test" / "test_data"
    documents, background = (
        tuple(t.strip() for t in (folder / name).read_text("latin-1").splitlines() if t.strip())
        for name in ("lee.cor", "lee_background.cor")
    )
    judged = torch.from_numpy(np.loadtxt(folder / "similarities0-1.txt"))
    if len(documents) != _DOCUMENTS or judged.shape != (_DOCUMENTS, _DOCUMENTS):
        raise ValueError(
            f"gensim's files hold {len(documents)} documents and {tuple(judged.shape)} judgements, "
            "expected 50: install another version of gensim"
        )
    # The file holds the upper half.
    similarity = judged.triu() + judged.triu(1).mT
    return LeeDocuments(documents, similarity, background)


def spearman(a: Tensor, b: Tensor) -> float:
    """Return the rank correlation of two vectors, equal values sharing their mean rank.

    Raises:
        ValueError: not two vectors of one length, 2 or more.

    Example:
        >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 8.0, 27.0])), 6)
        1.0
    """
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(
            f"vectors have shapes {tuple(a.shape)} and {tuple(b.shape)}: give two of one length, "
            "2 or more"
        )
    x, y = (r - r.mean() for r in (_ranks(a), _ranks(b)))
    return float((x * y).sum() / (x.norm() * y.norm()))


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[place]
