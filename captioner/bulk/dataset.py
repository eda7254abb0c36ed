"""Captions in Ray Data pipelines."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from captioner.bulk.output import Fields, caption_columns
from captioner.bulk.rows import picture_kind, read_picture, split_picture
from captioner.bulk.worker import ENVIRONMENT, load_model
from captioner.errors import CaptionerError, DataError, ImageError
from captioner.installation import require_extra
from captioner.model_file import find_checkpoint, read_header
from captioner.search.settings import SearchSettings
from captioner.sources import Fetched

if TYPE_CHECKING:
    import pyarrow as arrow
    import ray.data

    from captioner.captioning import Prepared


def caption_dataset(
    dataset: "ray.data.Dataset",
    column: str,
    *,
    model: str = "default",
    search: SearchSettings | None = None,
    words: bool = False,
    attention: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    threads: int = 1,
    batch_size: int = 32,
) -> "ray.data.Dataset":
    """Return a data set with the columns `caption`, `log_prob`, `score`, `confidence` and `error` added, lazily.

    Each row has a caption or an error. `captioner.bulk.output.caption_columns` documents all columns.

    Args:
        dataset: of rows with pictures.
        column: holds the pictures: bytes of their files, `{bytes, path}`, or paths or addresses.
        model: a shipped checkpoint by its name, or a model file. Its contents are sent to the workers.
        search: how to choose the words. None: as the model was chosen with. With `candidates` above 1, there is a
            column `candidates`.
        words: whether to add `words`, `log_probs` and `word_confidences`.
        attention: whether to add `attention`.
        workers: number of actors. None: on CPUs, as many as leave one CPU of each machine to the other steps of the
            pipeline, such as reading (Ray Data waits for ever where actors hold every CPU); on GPUs, one for each.
        device: `cpu`, with ONNX Runtime, or `cuda`, with PyTorch and a GPU for each worker.
        threads: CPUs of each worker on CPUs.
        batch_size: pictures that go through the network together.

    Raises:
        CaptionerError: if the model cannot be used, or the data set has columns of these names already.
    """
    with require_extra("bulk", "captioning a data set of Ray"):
        import ray
        from ray.data import ActorPoolStrategy

    path = find_checkpoint(model)
    search = search or read_header(path).search or SearchSettings()
    fields = Fields((), words, search.candidates > 1, attention)
    taken = set(caption_columns([], fields)) & set(dataset.columns(fetch_if_missing=False) or ())
    if taken:
        raise DataError(f"the data set has a column {min(taken)!r} already. Rename it.")
    options: dict[str, Any]
    if device == "cpu":
        nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        room = int(sum(max(0, cpus - 1) // threads for cpus in nodes))
        options = {"num_cpus": threads if workers or room else 0}  # of the only CPU of the cluster, none is left
        workers = workers or max(1, room)
    else:
        options = {"num_gpus": 1, "num_cpus": 0}
        workers = workers or int(ray.cluster_resources().get("GPU", 0))
        if not workers:
            raise CaptionerError(f"device {device!r}: the cluster has no GPU. Use 'cpu'.")
    return dataset.map_batches(
        _Captions,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=workers),
        fn_constructor_args=(column, str(path), ray.put(path.read_bytes()), device, threads, search, fields),
        runtime_env={"env_vars": ENVIRONMENT},
        **options,
    )


class _Captions:
    """Adds captions to batches of rows: the class of actors that Ray Data makes."""

    def __init__(
        self,
        column: str,
        name: str,
        model: "ray.ObjectRef[bytes]",
        device: str,
        threads: int,
        search: SearchSettings,
        fields: Fields,
    ) -> None:
        import ray

        self._column = column
        self._model = load_model(name, ray.get(model), device, threads)
        self._search = search
        self._fields = fields

    def __call__(self, batch: "arrow.Table") -> "arrow.Table":
        """Return the batch with further columns."""
        column = batch.column(self._column)
        kind = picture_kind(column.type)
        pictures = [self._read(kind, value) for value in column]
        found = [picture for picture in pictures if not isinstance(picture, ImageError)]
        captions = iter(self._model.caption_prepared(found, self._search))
        results = [str(picture) if isinstance(picture, ImageError) else next(captions) for picture in pictures]
        for name, values in caption_columns(results, self._fields).items():
            batch = batch.append_column(name, values)
        return batch

    def _read(self, kind: str | None, value: Any) -> "Prepared | ImageError":
        try:
            if kind is None:  # a tensor, as `ray.data.read_images` gives, or nothing that can be read
                return self._model.prepare(np.asarray(value.as_py()))
            content, path = split_picture(kind, value.as_py())
            if content is not None or path is None:
                return self._model.prepare(content or b"")
            return self._model.prepare(Fetched(path, partial(read_picture, path), keep=False))
        except ImageError as error:
            return error
