"""Generated tasks: every sample is a pure function of (config, seed, index).

Example:
    >>> task = get_task("recall")
    >>> config = task.config(vocab_size=64, length=32, pairs=4)
    >>> inputs, targets, mask = task.batch(config, seed=0, indices=range(16))
    >>> inputs.shape, int((targets != -100).sum())
    (torch.Size([16, 32]), 64)
"""

from __future__ import annotations

from manyheads.data.synthetic.copying import (
    COPY,
    SELECTIVE_COPY,
    CopyConfig,
    SelectiveCopyConfig,
)
from manyheads.data.synthetic.listops import (
    LISTOPS,
    ListOpsConfig,
    evaluate_listops,
    listops_ids,
    listops_text,
)
from manyheads.data.synthetic.positions import ETP, PI, PositionConfig
from manyheads.data.synthetic.recall import RECALL, RecallConfig
from manyheads.data.synthetic.running import RUNNING_MAX, RUNNING_MEAN, RunningConfig
from manyheads.data.synthetic.task import Fold, Task, TaskBatch, TaskBatches, TaskConfig
from manyheads.errors import unknown_name

__all__ = [
    "TASKS",
    "CopyConfig",
    "Fold",
    "ListOpsConfig",
    "PositionConfig",
    "RecallConfig",
    "RunningConfig",
    "SelectiveCopyConfig",
    "Task",
    "TaskBatch",
    "TaskBatches",
    "TaskConfig",
    "evaluate_listops",
    "get_task",
    "listops_ids",
    "listops_text",
]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (RECALL, COPY, SELECTIVE_COPY, LISTOPS, ETP, PI, RUNNING_MEAN, RUNNING_MAX)
}


def get_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ValueError: no such task; the nearest name is given.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]
