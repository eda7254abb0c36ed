"""Measure how the throughput of `caption-bulk` grows with its workers, and draw it.

    python scripts/bulk_scaling.py SHARD docs/bulk-scaling.png --seconds 0.25

A stand-in for the network sleeps as long as one core computes, so that a small machine can stand for many. Reading,
decoding, scheduling and writing are real. So this measures the pipeline, and not the captioner. The cores of this
machine decode for all workers: the sleep must be so long that they have time for that.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from captioner.bulk.output import Fields
from captioner.bulk.pool import Pool
from captioner.bulk.rows import Columns, Unit, read_rows
from captioner.bulk.run import Resources, cluster
from captioner.bulk.worker import Job, Worker
from captioner.caption import Caption, Rectangle
from captioner.captioning import Prepared
from captioner.images import ImageSettings, Source, open_frame
from captioner.search import SearchSettings

WORKERS = (1, 2, 4, 8, 16)


class Sleeper:
    """A captioner whose network sleeps."""

    def __init__(self, seconds: float) -> None:
        """Hold the seconds of a picture."""
        self._seconds = seconds

    def prepare(self, picture: Source) -> Prepared:
        """Read a picture, as a captioner does."""
        return Prepared(*open_frame(picture, ImageSettings()))

    def caption_prepared(self, pictures: Sequence[Prepared], settings: SearchSettings) -> list[Caption]:
        """Sleep."""
        time.sleep(self._seconds * len(pictures))
        maps = np.zeros((0, 7, 7), np.float32)
        return [Caption("a dog", (), (), -1.0, -1.0, maps, Rectangle(0, 0, 1, 1)) for _ in pictures]


class PunctualWorker(Worker):
    """A worker that begins when all others can, so that the start of processes is not measured."""

    def __init__(self, job: Job, load: Callable[[], Sleeper], unit: Unit, gate: Path, count: int) -> None:
        """Hold the folder in which each worker leaves a file when it is ready, and their number."""
        super().__init__(job, load)  # type: ignore[arg-type]
        self._unit = unit
        self._gate = gate
        self._count = count

    def start(self) -> str:
        """Import what the first picture and the first table need, and wait for the others."""
        import pyarrow.parquet  # noqa: F401

        version = super().start()
        self._read(next(read_rows(self._unit, Columns())), keep=False)
        (self._gate / str(time.monotonic_ns())).touch()
        while len(list(self._gate.iterdir())) < self._count:
            time.sleep(0.05)
        return version


def measure(shard: str, workers: int, seconds: float, units: int) -> float:
    """Return the pictures a second when each worker has so many units."""
    import ray

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as gate:
        # Smaller than usual: while the first of a unit is decoded, its worker does not sleep.
        job = Job(folder, "parquet", SearchSettings(), Columns(), Fields(), batch_size=16)
        unit = Unit("shard", (shard,))
        actor = ray.remote(PunctualWorker).options(num_cpus=1, max_restarts=0)
        start = partial(actor.remote, job, partial(Sleeper, seconds), unit, Path(gate), workers)
        pool = Pool(start, workers, print)
        pool.run((number, unit) for number in range(units * workers))
        ended = time.time()
        began = max(file.stat().st_mtime for file in Path(gate).iterdir())
        return pool.counts.rows / (ended - began)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", help="a WebDataset shard, which every unit reads")
    parser.add_argument("figure", help="where the plot goes")
    parser.add_argument("--seconds", type=float, default=0.25, help="of one core for a picture (%(default)s)")
    parser.add_argument("--units", type=int, default=1, help="of each worker (%(default)s)")
    options = parser.parse_args()
    speeds: list[float] = []
    with cluster(Resources(workers=max(WORKERS))):
        for workers in WORKERS:
            speed = measure(str(Path(options.shard).resolve()), workers, options.seconds, options.units)
            speeds.append(speed)
            efficiency = speed / workers / speeds[0]
            print(f"{workers:2} workers: {speed:6.1f} pictures a second, efficiency {efficiency:.3f}", flush=True)

    import matplotlib.pyplot as plot

    figure, axes = plot.subplots(figsize=(5, 3.6), layout="constrained")
    axes.plot(
        WORKERS, [workers * speeds[0] for workers in WORKERS], color="0.6", label="one worker, times their number"
    )
    axes.plot(WORKERS, speeds, marker="o", label="measured")
    axes.set(xlabel="workers", ylabel="pictures a second", xticks=WORKERS, xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
