"""Runs a recipe in one process or several, and turns its end into an exit code."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from safetensors import SafetensorError

from manyheads.errors import require_extra
from manyheads.train.folder import RunFolder, load_options
from manyheads.train.options import TrainOptions
from manyheads.train.report import print_results
from manyheads.train.state import read_position
from manyheads.train.stop import Interrupted, StopRequest

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["check_batch", "launch"]

O = TypeVar("O", bound=TrainOptions)  # noqa: E741
P = TypeVar("P")
Recipe = Callable[["Fabric", O, P, StopRequest], dict[str, Any]]


def launch(options: O, prepare: Callable[[O], P], recipe: Recipe[O, P]) -> int:
    """Check everything, train, print the figures; return the exit code.

    With ``devices`` above 1 the recipe runs in as many processes of this machine; under torchrun
    in those that torchrun started. Ctrl-C gives 130 and SIGTERM 143, both with the state saved.

    Args:
        options: as they came from the command line.
        prepare: reads the data and checks all it can; called before any work, in this process.
        recipe: called in every process with Fabric, the options, what ``prepare`` returned, and
            the request to stop; returns the results.

    Raises:
        ValueError: wrong options, data or folder; a loss that is no number.
        MissingExtraError: the extra ``train`` is not installed.
    """
    require_extra("lightning_fabric", "train", f"train {options.recipe}")
    require_extra("rich", "train", f"train {options.recipe}")
    if options.tensorboard:
        require_extra("tensorboard", "train", "--tensorboard")
    options = load_options(options)
    local, nodes = _torchrun() or (options.devices, 1)
    options = options.replace(devices=local)
    check_batch(options, nodes)
    _check_accelerator(options)
    folder = RunFolder(options)
    if folder.results.is_file() and not options.restart:
        if _is_first():
            print_results(folder.path, finished=True)
        return 0
    threads = torch.get_num_threads()
    try:
        status, detail = _launch(options, prepare(options), recipe)
    finally:
        torch.set_num_threads(threads)
    if status == "interrupted":
        if _is_first():
            print(f"\n{_farewell(options)}", file=sys.stderr)
        return 128 + detail
    if status == "error":
        raise ValueError(detail)
    if _is_first():
        print_results(folder.path)
    return 0


def check_batch(options: TrainOptions, nodes: int = 1) -> None:
    """Check that the batch can be dealt out, to processes on so many machines.

    Raises:
        ValueError: it is no multiple of processes times accumulated parts.
    """
    processes = options.devices * nodes
    parts = processes * options.accumulate
    if options.batch_size % parts:
        raise ValueError(
            f"batch_size {options.batch_size} is not a multiple of {parts}: processes {processes} "
            f"times accumulate {options.accumulate}"
        )


def _check_accelerator(options: TrainOptions) -> None:
    there = {
        "auto": True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there[options.accelerator]:
        raise ValueError(
            f"accelerator {options.accelerator!r} is not there for this torch: use cpu or auto"
        )
    if options.accelerator == "cuda" and options.devices > torch.cuda.device_count():
        raise ValueError(
            f"devices {options.devices} is more than the {torch.cuda.device_count()} of cuda here"
        )


def _launch(options: O, prepared: P, recipe: Recipe[O, P]) -> tuple[str, Any]:
    with _quiet():
        from lightning_fabric import Fabric

        external = _torchrun()
        nodes = external[1] if external else 1
        several = options.devices * nodes > 1
        fabric = Fabric(
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=nodes,
            strategy="auto" if not several else "ddp" if external else "ddp_spawn",
            precision=cast(Any, options.precision),
        )
        # Bound to the function: Fabric looks into arguments, and does not stand frozen ones.
        job = partial(_in_process, options=options, prepared=prepared, recipe=recipe)
        if not several or external is not None:
            fabric.launch()
            return job(fabric)
        with _forwarding() as asked:
            try:
                return fabric.launch(cast(Any, job))
            except Exception:
                # Ctrl-C while the processes were still starting.
                if asked:
                    return "interrupted", asked[0]
                raise


def _in_process(fabric: Fabric, options: O, prepared: P, recipe: Recipe[O, P]) -> tuple[str, Any]:
    alone = fabric.world_size == 1
    with StopRequest(alone=alone) as stop, _quiet():
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        try:
            return "done", recipe(fabric, options, prepared, stop)
        except Interrupted as stopped:
            return "interrupted", stopped.signum
        except ValueError as error:
            return "error", str(error)
        except (OSError, SafetensorError) as error:
            if not alone:
                raise
            return "error", (
                f"{error}; what is saved in {str(options.out)!r} is whole: the same command goes on"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Fabric's own announcements off the terminal."""
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning_fabric")
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def _forwarding() -> Iterator[list[int]]:
    """Pass a request to stop on to the child processes, which save and end by themselves."""
    asked: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        if signum in asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signum)
        for child in multiprocessing.active_children():
            child.terminate()

    main = threading.current_thread() is threading.main_thread()
    signums = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {s: signal.signal(s, forward) for s in signums}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _torchrun() -> tuple[int, int] | None:
    """Return the processes a machine and the machines that torchrun has started, if it has."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    return local, world // local


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _farewell(options: TrainOptions) -> str:
    command = f"manyheads train {options.recipe} --resume {options.out}"
    path = RunFolder(options).checkpoint
    if not path.is_file():
        return "stopped before the first step"
    step = read_position(path).step
    return (
        f"stopped after step {step:,} of {options.steps:,}, all is saved. Go on with\n  {command}"
    )
