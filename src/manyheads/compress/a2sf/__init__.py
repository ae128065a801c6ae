"""Key-value caches of a fixed size: A2SF (2407.20485) and the policies it is compared with.

**Lossy**, without training: tokens are evicted while a model reads and generates.
"""

from __future__ import annotations

from manyheads.compress.a2sf.a2sf import A2SF, A2SFConfig
from manyheads.compress.a2sf.cross import CrossState
from manyheads.compress.a2sf.h2o import H2O
from manyheads.compress.a2sf.policy import CacheConfig, CachePolicy, Split
from manyheads.compress.a2sf.quality import bits_per_byte, continuation_loss
from manyheads.compress.a2sf.scores import column_sums, forgetting_weights
from manyheads.compress.a2sf.simulate import simulate_eviction
from manyheads.compress.a2sf.sink_recent import SinkConfig, SinkRecent
from manyheads.compress.a2sf.snapkv import SnapKV, SnapKVConfig
from manyheads.compress.a2sf.state import EvictionState
from manyheads.compress.a2sf.streaming import StreamingLLM

__all__ = [
    "A2SF",
    "H2O",
    "A2SFConfig",
    "CacheConfig",
    "CachePolicy",
    "CrossState",
    "EvictionState",
    "SinkConfig",
    "SinkRecent",
    "SnapKV",
    "SnapKVConfig",
    "Split",
    "StreamingLLM",
    "bits_per_byte",
    "column_sums",
    "continuation_loss",
    "forgetting_weights",
    "simulate_eviction",
]
