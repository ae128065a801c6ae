"""Our language models as transformers models, and our attention inside transformers' own.

Importing this registers ``ManyheadsConfig`` with the Auto classes, so that
``AutoModelForCausalLM.from_pretrained`` reads what ``save_pretrained`` wrote; so do they with the
folders of `manyheads shrink`.
"""

from __future__ import annotations

from manyheads.errors import require_extra

require_extra("transformers", "transformers", "manyheads.bridges.transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

from manyheads.bridges.transformers.attention import register  # noqa: E402
from manyheads.bridges.transformers.cache import ManyheadsCache  # noqa: E402
from manyheads.bridges.transformers.config import ManyheadsConfig  # noqa: E402
from manyheads.bridges.transformers.landmark import landmark_from_llama  # noqa: E402
from manyheads.bridges.transformers.modeling import (  # noqa: E402
    ManyheadsForCausalLM,
    ManyheadsModel,
)
from manyheads.bridges.transformers.shrunk import ShrunkConfig, register_shrunk  # noqa: E402
from manyheads.layers.few_rows import quicken  # noqa: E402

__all__ = [
    "ManyheadsCache",
    "ManyheadsConfig",
    "ManyheadsForCausalLM",
    "ManyheadsModel",
    "ShrunkConfig",
    "landmark_from_llama",
    "quicken",
    "register",
]

AutoConfig.register("manyheads", ManyheadsConfig, exist_ok=True)
AutoModel.register(ManyheadsConfig, ManyheadsModel, exist_ok=True)
AutoModelForCausalLM.register(ManyheadsConfig, ManyheadsForCausalLM, exist_ok=True)
register_shrunk()
