"""Settings of a training run, a TOML file: the schema, the defaults and the documentation."""

import difflib
import json
import os
import tomllib
from collections.abc import Collection
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from captioner import config
from captioner.config import Range
from captioner.console import escape_controls
from captioner.errors import CaptionerError, ConfigError
from captioner.images import ImageSettings
from captioner.network.encoder import read_timm_images
from captioner.network.model import build_network
from captioner.search import SearchSettings
from captioner.settings import ModelSettings
from captioner.vocabulary import SPECIAL
from evaluation.datasets import READERS, WITH_COLUMNS, Columns
from evaluation.metrics import PYTHON_SCORES

MOST = 1_000_000
"""Maximum value of counts."""


def _check_folder_name(name: str) -> None:
    if not name or Path(name).name != name or name == ".." or "\0" in name:
        raise ValueError(f"name: must be a valid folder name, got {name!r}")


def _check_known(field: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"{field}: unknown {value!r}; {hint}")


Positive = Annotated[int, Range(1, MOST)]
Natural = Annotated[int, Range(0, MOST)]
Weight = Annotated[float, Range(0, 1000)]
Share = Annotated[float, Range(0, 1)]
Rate = Annotated[float, Range(0, 1, exclude="low")]


@dataclass(frozen=True)
class DatasetSettings:
    """A set of captioned pictures."""

    name: str
    """Name in logs, scores and caches."""
    layout: str
    """Layout of its files; a key of `evaluation.datasets.READERS`."""
    path: str
    """Its folder, file or address. Environment variables such as `$CAPTIONER_DATA` are expanded."""
    columns: Columns = field(default_factory=Columns)
    """Names of columns, for the layouts `evaluation.datasets.WITH_COLUMNS`."""
    missing: Literal["error", "skip"] = "error"
    """Whether pictures that are not on disk are an error, or skipped."""
    at_most: Share = 0.0
    """Maximum share of the pictures that may be missing, which `missing = "skip"` needs."""
    boxes: str = ""
    """JSON file of boxes of persons, for `loss.persons`: `{"PICTURE": [[left, top, right, bottom], ...]}`, with
    paths relative to the folder of the file, and boxes in fractions of the picture. Other pictures have no known
    boxes."""

    def __post_init__(self) -> None:
        config.check(self)
        _check_folder_name(self.name)
        _check_known("layout", self.layout, READERS)
        if self.columns != Columns() and self.layout not in WITH_COLUMNS:
            raise ValueError(
                f"columns: available for the layouts {', '.join(WITH_COLUMNS)}, not for {self.layout!r}"
            )
        if (self.missing == "skip") != bool(self.at_most):
            raise ValueError(
                'at_most: must be above 0 if and only if missing is "skip": the maximum share of missing pictures, '
                "such as 0.95"
            )


@dataclass(frozen=True)
class EncoderTraining:
    """Initial weights of the encoder, and the stages that learn."""

    weights: str = "none"
    """`none`; `imagenet`; the name of a shipped checkpoint, such as `flickr8k`; or a file. See
    `captioner.network.encoder.load_encoder_weights`."""
    train_from: str = "none"
    """First stage of the encoder that learns, with all later stages; `all`: every stage. Pictures are then read at
    every step. `none`: the encoder is frozen, and its grids are computed once."""
    learning_rate: Rate = 1e-4
    """Maximum learning rate of the stages that learn; its schedule is that of the decoder."""
    cache: str = "cache"
    """Folder of the grid cache of a frozen encoder."""
    mirrored: bool = True
    """Mirror pictures at random, unless a caption says left or right."""
    augment: bool = False
    """Random crops and colours for an encoder that learns; see `training.augment`."""

    def __post_init__(self) -> None:
        config.check(self)
        if self.augment and not self.learns:
            raise ValueError("augment: not available for a frozen encoder, whose grids are cached; set train_from")

    @property
    def learns(self) -> bool:
        """Whether any stage of the encoder learns."""
        return self.train_from != "none"


@dataclass(frozen=True)
class LossSettings:
    """Loss settings."""

    label_smoothing: Annotated[float, Range(0, 1, exclude="high")] = 0.1
    """Share of the target that is distributed over all words (Szegedy et al. 2016, arXiv 1512.00567, section 7)."""
    doubly_stochastic: Weight = 0.1
    """Lambda of Show, Attend and Tell, equation 14. The penalty is the mean over captions and locations of
    (1 - the attention of the location summed over the words)^2, and is added to the mean loss per word. (The paper
    sums over locations: its lambda is this divided by L.)"""
    coverage: Weight = 1.0
    """Weight of the coverage loss (See et al. 2017, arXiv 1704.04368, equation 13), if the attention has
    coverage."""
    reinforce: Weight = 0.1
    """Weight of the reward of the locations that `hard` attention samples; lambda_r of Show, Attend and Tell,
    section 4.1."""
    entropy: Weight = 0.0
    """Weight of the entropy of `hard` attention, which keeps it from converging early; lambda_e there. Without it,
    `hard` learned faster in our runs (docs/attention.md)."""
    sharpness: Weight = 0.0
    """Weight of the mean entropy of attention, in nats, which makes it sharp."""
    sharpness_rise: Share = 0.5
    """Share of the run in which `sharpness` rises linearly from 0. With random weights, attention that is sharp
    from the start converges to one cell before it has learned where to attend. 0: full weight from the first
    step."""
    persons: Weight = 0.0
    """Weight of -log(attention inside boxes of persons), summed over the words that name a person and divided by
    the number of all words. Pictures without boxes are skipped; see `DatasetSettings.boxes`. Liu et al. 2017,
    "Attention Correctness in Neural Image Captioning" (arXiv 1605.09553)."""
    detectors: Weight = 0.0
    """Weight of word detectors, which learn from captions which words each cell shows, by noisy-OR over cells (Fang
    et al. 2015, arXiv 1411.4952, section 3). They exist in training only, for `detected` and for an encoder that
    learns."""
    detected: Weight = 0.0
    """Weight of -log(attention where the detector of the word responds), for words with a detector, summed and
    divided as for `persons`. Responses are divided by their maximum, and words are weighted by the probability that
    the detector gives them in the picture."""

    def __post_init__(self) -> None:
        config.check(self)
        if self.detected and not self.detectors:
            raise ValueError("detected: needs detectors; set loss.detectors above 0")


@dataclass(frozen=True)
class SelfCriticalSettings:
    """Self-critical training (Rennie et al. 2017, arXiv 1612.00563).

    The reward is CIDEr-D against the training captions of the picture; see `training.reward`. The run must start
    from a trained network; see `TrainingSettings.start_from`.
    """

    samples: Annotated[int, Range(1, 1000)] = 5
    """Number of sampled captions per picture, of up to `search.max_words` words."""
    baseline: Literal["greedy", "others"] = "others"
    """Baseline of the reward: the greedy caption (Rennie et al.), or the mean of the other samples of the picture
    (Luo 2020, arXiv 2003.09971)."""
    bleu: Weight = 0.0
    """Weight of BLEU-4, which is added to CIDEr-D."""
    unconfirmed: Weight = 0.0
    """Penalty on the reward for each thing that a caption names and no training caption of the picture confirms, as
    `evaluation.confirmed` decides. For a subword vocabulary, only things of one piece count."""
    cross_entropy: Share = 0.2
    """Share of `loss`, of the reference captions, in the total loss, 0..1."""

    def __post_init__(self) -> None:
        config.check(self)
        if self.baseline == "others" and self.samples < 2:
            raise ValueError(f"samples: must be at least 2 for this baseline, got {self.samples}")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with linear warm-up and cosine decay to 0 (Loshchilov
    and Hutter 2017, arXiv 1608.03983)."""

    epochs: Positive = 10
    batch_size: Positive = 32
    """Number of pictures per step, each with all its captions, over all processes."""
    accumulate: Positive = 1
    """Number of parts of a step in each process, computed in sequence to save memory; the result is the same."""
    learning_rate: Rate = 8e-4
    """Maximum learning rate."""
    warmup_steps: Annotated[int, Range(0, 1000 * MOST)] = 200
    weight_decay: Weight = 0.01
    clip_norm: Annotated[float, Range(0, 1e9, exclude="low")] = 1.0
    """Maximum norm of gradients; larger gradients are scaled down."""
    average_decay: Annotated[float, Range(0, 1, exclude="high")] = 0.999
    """Decay of the moving average of the weights, which is evaluated and saved; 0: the last weights."""

    def __post_init__(self) -> None:
        config.check(self)
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate: must be at most batch_size, {self.batch_size}, got {self.accumulate}")


@dataclass(frozen=True)
class SelectionSettings:
    """Selection of checkpoints, and early stopping."""

    metric: str = "CIDEr-D"
    """Score that selects the best checkpoint, averaged over the development sets; one of
    `evaluation.metrics.PYTHON_SCORES`."""
    patience: Natural = 0
    """Early stopping after this many epochs without a better score; 0: off."""
    keep_last: Natural = 0
    """Number of last epochs whose checkpoints are kept, `epoch-001.safetensors` and so on."""

    def __post_init__(self) -> None:
        config.check(self)
        _check_known("metric", self.metric, PYTHON_SCORES)


@dataclass(frozen=True)
class TrainingSettings:
    """All settings of a run: the same settings and data give the same checkpoint."""

    datasets: tuple[DatasetSettings, ...]
    name: str
    """The folder of the run is `runs/NAME`."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 1
    device: str = "auto"
    min_count: Annotated[int, Range(1, 1000 * MOST)] = 4
    """Words that occur less often in the training captions are `<unk>`."""
    pieces: Natural = 0
    """Size of a subword vocabulary, which ignores `min_count`, and whose subwords count for `max_words`; 0: words.
    Languages without spaces between words, such as Thai, Chinese and Japanese, need subwords."""
    max_words: Annotated[int, Range(1, 1000)] = 24
    """Maximum length of training captions. Longer ones are truncated, without an end."""
    start_from: str = "none"
    """Checkpoint with the initial weights: the name of a shipped one, such as `flickr8k`, or a file, such as
    `runs/flickr8k/best.safetensors`. It must have the model (except dropout and `attention.normalize`) and the
    image settings of this run; new words have random weights. `none`: random weights."""
    scheduled_sampling: Share = 0.0
    """Share of input words that a recurrent decoder samples itself at the end of the run, rising linearly from 0
    (Bengio et al. 2015, arXiv 1506.03099, section 2.4)."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network in training; weights, loss and captioning are float32. `float16` is for GPUs without
    `bfloat16`, with loss scaling (Micikevicius et al. 2018, arXiv 1710.03740)."""
    tensorboard: bool = False
    """Also log to TensorBoard, in the folder of the run."""
    save_minutes: Annotated[float, Range(0, MOST)] = 5.0
    """Interval of saving the state to resume from, in minutes."""
    model: ModelSettings = field(default_factory=ModelSettings)
    images: ImageSettings = field(default_factory=ImageSettings)
    encoder: EncoderTraining = field(default_factory=EncoderTraining)
    loss: LossSettings = field(default_factory=LossSettings)
    self_critical: SelfCriticalSettings | None = None
    """None: train on the reference captions only."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    """Search settings for development captions."""
    selection: SelectionSettings = field(default_factory=SelectionSettings)
    card: dict[str, Any] = field(default_factory=dict)
    """Model card of the checkpoint: sources, licences, limits, as text."""

    def __post_init__(self) -> None:
        config.check(self)
        if not self.datasets:
            raise ValueError("datasets: expected at least one")
        names = [dataset.name for dataset in self.datasets]
        if len(set(names)) < len(names):
            raise ValueError(f"datasets: names must be unique, got {', '.join(names)}")
        _check_folder_name(self.name)
        try:
            json.dumps(self.card, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"card: expected text, numbers, true, false, lists and tables ({error})") from error
        if bool(self.loss.persons) != any(dataset.boxes for dataset in self.datasets):
            raise ValueError("loss.persons: must be above 0 if and only if a data set has boxes")
        if self.loss.persons and self.images.frame != "stretch":
            raise ValueError("loss.persons: boxes need whole pictures; set images.frame to 'stretch'")
        if self.scheduled_sampling and self.model.decoder.kind == "transformer":
            raise ValueError(
                "scheduled_sampling: not available for the 'transformer' decoder, which reads all words of a "
                "caption at once; set it to 0, or use a recurrent decoder"
            )


def read_settings(file: Path, overrides: list[str]) -> TrainingSettings:
    """Return the settings of a TOML file, with overrides such as `optimizer.epochs=3`.

    Raises:
        ConfigError: with one line per problem.
    """
    source = escape_controls(str(file))
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{source}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: cannot read this TOML file ({error})") from error
    for override in overrides:
        _override(values, override)
    try:
        _set_timm_images(values)
    except CaptionerError as error:
        raise ConfigError(f"{source}: {error}") from error
    settings = config.from_dict(TrainingSettings, values, source=source)
    try:
        with torch.device("meta"):  # check the network before any work
            build_network(settings.model, len(SPECIAL) + 1, settings.images.size)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return settings


def _set_timm_images(values: dict[str, Any]) -> None:
    """Let images be what a network of timm was trained on, where the configuration does not say otherwise."""
    name, images = values, values.setdefault("images", {})
    for key in ("model", "encoder", "name"):
        name = name.get(key, {}) if isinstance(name, dict) else {}
    if isinstance(name, str) and name.startswith("timm:") and isinstance(images, dict):
        values["images"] = {**read_timm_images(name), **images}


def _override(values: dict[str, Any], override: str) -> None:
    """Set a value in nested tables by KEY=VALUE."""
    option = f"--set {escape_controls(override)}"
    path, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"{option}: expected KEY=VALUE, such as optimizer.epochs=3")
    try:
        override.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{option}: not UTF-8") from None
    *tables, key = path.strip().split(".")
    table = values
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{option}: {name} is not a table")
    table[key] = _parse_value(value.strip(), _type_of([*tables, key]))


def _type_of(keys: list[str]) -> Any:
    """Return the type of a nested setting; None if there is no such setting."""
    found: Any = TrainingSettings
    for key in keys:
        found = get_type_hints(found).get(key) if is_dataclass(found) else None
        if options := [option for option in get_args(found) if option is not type(None)]:
            found = options[0] if get_origin(found) in (Union, UnionType) else found
    return found


def _parse_value(text: str, expected: Any) -> Any:
    """Return a TOML value.

    Text needs no quotes if the setting expects text (`name=2024`), or if it is not valid TOML (a path).
    """
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    if values.keys() != {"value"} or (expected is str and not isinstance(values["value"], str)):
        return text
    return values["value"]


def expand_path(path: str) -> Path:
    """Return the path with environment variables expanded.

    Raises:
        ConfigError: if a variable is not set, or the path is invalid.
    """
    if "\0" in path:
        raise ConfigError(f"{path!r}: invalid path (NUL character)")
    expanded = os.path.expandvars(path)
    if "$" in expanded:
        raise ConfigError(f"{path}: set the environment variable of this path")
    try:
        return Path(expanded).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: no such user, or no home folder") from error
