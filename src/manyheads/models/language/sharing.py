"""Copies for use of models whose layers share matrices."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from manyheads.layers.sharing import store_coefficients, to_dense
from manyheads.models.base import Model

__all__ = ["exported"]

M = TypeVar("M", bound=Model)


def exported(model: M, *, dense: bool) -> M:
    """Return a copy for use, of a model whose config says in ``sharing`` what layers share; exact.

    Args:
        model: stays as it is.
        dense: every layer has its mixed matrices, and nothing is shared any more; False: the
            atoms stay, and a network that made coefficients gives way to its table.
    """
    made, config = copy.deepcopy(model), model.config
    sharing: dict[str, Any] = getattr(config, "sharing", {})
    direct = {**sharing, "coefficients": "direct"} if sharing and not dense else {}
    made.config = config.replace(sharing=direct)
    return to_dense(made) if dense else store_coefficients(made)
