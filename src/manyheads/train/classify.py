"""Train a classifier of time series, measured by accuracy on the test series, every one of them.

B series, N length, C channels, K classes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import SERIES, SeriesData, SeriesSplit, load_series
from manyheads.data.seeding import epoch_indices, hold_out_indices
from manyheads.errors import nearest
from manyheads.models.language.mixer_encoder import MixerEncoder, MixerEncoderConfig
from manyheads.train.files import write_json
from manyheads.train.launch import launch
from manyheads.train.loop import (
    evaluating,
    fit,
    load_kept,
    open_folder,
    part_size,
    seed_process,
    sum_over_processes,
)
from manyheads.train.mixer_options import ClassifyOptions
from manyheads.train.own_series import read_own_series
from manyheads.train.report import results
from manyheads.train.stop import StopRequest

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["ClassifyOptions", "SeriesBatches", "accuracy", "run", "train"]


class Prepared(NamedTuple):
    """What is read before any work; ``valid`` is held out of the training series, or None."""

    data: SeriesData
    training: SeriesSplit
    valid: SeriesSplit | None
    sha256: str
    config: MixerEncoderConfig


def run(options: ClassifyOptions) -> int:
    """Do ``manyheads train classify``; returns the exit code."""
    return launch(options, prepare, train)


def prepare(options: ClassifyOptions) -> Prepared:
    """Read the series and build the config, so that their errors come before any work."""
    data = read_data(options.data)
    training, valid = hold_out(data.train, options.valid_fraction, options.seed)
    longest = data.train.mask.shape[1]
    config = MixerEncoderConfig(
        num_classes=len(data.class_names),
        in_channels=len(data.mean),
        embed_dim=options.embed_dim,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        mixers=options.mixers,
        mixer_options=options.read_mixer_options(),
        mlp_ratio=options.mlp_ratio,
        max_length=max(2048, longest),
        dropout=options.dropout,
        pool=options.pool,  # type: ignore[arg-type]
        sharing=options.read_sharing(),
    )
    with torch.device("meta"):
        MixerEncoder(config)
    digest = hashlib.sha256()
    for tensor in (*data.train, *data.test):
        digest.update(tensor.numpy().tobytes())
    return Prepared(data, training, valid, digest.hexdigest(), config)


def read_data(name: str) -> SeriesData:
    """Read a set that ships with aeon, a folder of .ts files, or a .csv or .npz file.

    Raises:
        ValueError: no such data, or they do not parse.
        MissingExtraError: a built-in name, and aeon is not installed.
    """
    path = Path(name)
    if name in SERIES or path.is_dir():
        return load_series(name)
    if not path.is_file() or path.suffix not in (".csv", ".npz"):
        raise ValueError(
            f"data {name!r} is no built-in set{nearest(name, SERIES)}, folder of .ts files, .csv "
            f"or .npz file; built in: {', '.join(sorted(SERIES))}"
        )
    return read_own_series(path)


def train(
    fabric: Fabric, options: ClassifyOptions, prepared: Prepared, stop: StopRequest
) -> dict[str, Any]:
    """Train in this process, alone or beside others; returns the results."""
    data, training, valid, sha256, config = prepared
    with open_folder(fabric, options, {"sha256": sha256}) as folder:
        # Set up.
        if fabric.is_global_zero:
            write_json(folder.path / "data.json", describe(data))
        torch.manual_seed(options.seed)
        model = MixerEncoder(config)
        seed_process(fabric, options.seed)
        batches = SeriesBatches(
            training,
            batch_size=part_size(fabric, options),
            seed=options.seed,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        )

        # Fit. On the way the test series are not looked at.
        name = "training_accuracy" if valid is None else "valid_accuracy"

        def evaluate() -> dict[str, float]:
            right, count = accuracy(fabric, model, valid or training, options.batch_size, stop)
            return {name: right / count}

        at = fit(
            fabric,
            options,
            folder,
            stop,
            model,
            batches,
            loss=loss,
            evaluate=evaluate,
            figures=(name,),
            unit=("series", options.batch_size),
            sign=0 if valid is None else 1,
        )

        # Evaluate the weights that were kept on all test series.
        load_kept(folder, model)
        right, count = accuracy(fabric, model, data.test, options.batch_size, stop)
        kept = {} if valid is None else {"valid_accuracy": at.best, "best_step": at.best_step}
        lengths = torch.cat((data.train.lengths, data.test.lengths))
        shortest, longest = int(lengths.min()), int(lengths.max())
        span = f"{shortest} to {longest}" if shortest < longest else f"{longest}"
        found = results(
            options,
            title=f"classify {options.mixers}, {model.num_parameters():,} parameters, on "
            f"{data.name} ({len(training.labels)} training and {count} test series of "
            f"{span} steps, {len(data.mean)} channels, "
            f"{len(data.class_names)} classes)",
            figures={
                "test_accuracy": right / count,
                "right": right,
                "test_series": count,
                **kept,
                "epochs": options.steps * options.batch_size / len(training.labels),
                "seconds": at.seconds,
            },
            sha256=sha256,
            parameters=model.num_parameters(),
            model=model.config.to_dict(),
        )
        if fabric.is_global_zero:
            write_json(folder.results, found)
        return found


def describe(data: SeriesData) -> dict[str, Any]:
    """Return what is needed to put other series through the model."""
    return {
        "name": data.name,
        "class_names": list(data.class_names),
        "mean": data.mean.tolist(),
        "std": data.std.tolist(),
    }


def loss(module: nn.Module, batch: SeriesSplit) -> Tensor:
    """Return the mean cross entropy of the classes, in nats."""
    return F.cross_entropy(module(batch.values, mask=batch.mask).float(), batch.labels)


def accuracy(
    fabric: Fabric, model: MixerEncoder, split: SeriesSplit, batch_size: int, stop: StopRequest
) -> tuple[int, int]:
    """Return how many of the series are classified rightly, of how many: all of them."""
    own = range(fabric.global_rank, len(split.labels), fabric.world_size)
    right, count = 0, 0
    with evaluating(fabric, model):
        for start in range(0, len(own), batch_size):
            stop.check()
            batch = fabric.to_device(take(split, torch.tensor(own[start : start + batch_size])))
            classes = model(batch.values, mask=batch.mask).argmax(-1)
            right += int((classes == batch.labels).sum())
            count += len(batch.labels)
    right, count = (int(n) for n in sum_over_processes(fabric, right, count))
    return right, count


def take(split: SeriesSplit, index: Tensor) -> SeriesSplit:
    """Return some of the series, padded to the longest of them."""
    mask = split.mask[index]
    longest = int(mask.sum(1).max())
    return SeriesSplit(split.values[index, :longest], mask[:, :longest], split.labels[index])


def hold_out(
    split: SeriesSplit, fraction: float, seed: int
) -> tuple[SeriesSplit, SeriesSplit | None]:
    """Hold out a share of each class, at least one series of it; None for a share of 0.

    Raises:
        ValueError: a class has too few series for both parts.
    """
    if not fraction:
        return split, None
    train, valid = hold_out_indices(
        split.labels.numpy(), fraction, seed, option="valid_fraction", what="series"
    )
    return take(split, torch.tensor(train)), take(split, torch.tensor(valid))


class SeriesBatches:
    """Endless training batches; batch k is a pure function of (seed, k, rank, world_size)."""

    def __init__(
        self, split: SeriesSplit, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def batch(self, step: int) -> SeriesSplit:
        """Return batch ``step`` of this process."""
        index = epoch_indices(
            step, len(self.split.labels), batch_size=self.batch_size, seed=self.seed,
            rank=self.rank, world_size=self.world_size,
        )  # fmt: skip
        return take(self.split, torch.tensor(index))
