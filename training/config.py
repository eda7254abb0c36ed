"""The settings of a training run, one TOML file each; these classes are the schema, defaults and documentation."""

import difflib
import json
import os
import tomllib
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from captioner import config
from captioner.console import escape_controls
from captioner.errors import CaptionerError, ConfigError
from captioner.images import ImageSettings
from captioner.network.encoder import read_timm_images
from captioner.network.model import build_network
from captioner.search import SearchSettings
from captioner.settings import ModelSettings
from captioner.vocabulary import SPECIAL
from evaluation.metrics import METRICS

MOST = 1_000_000
"""Largest value of settings that count something."""


def _check_folder_name(name: str) -> None:
    if not name or Path(name).name != name or name == ".." or "\0" in name:
        raise ValueError(f"name: must be the name of a folder, got {name!r}")


@dataclass(frozen=True)
class DatasetSettings:
    """A set of captioned pictures."""

    name: str
    """For logs, scores and the names of caches."""
    layout: Literal["coco", "karpathy", "flickr8k", "flickr30k", "jsonl", "csv", "tsv", "folder", "shapes"]
    """How it lies on disk; see `evaluation.datasets`."""
    path: str
    """Its folder or file; environment variables such as `$CAPTIONER_DATA` are filled in."""
    boxes: str = ""
    """A JSON file with the boxes of persons, for `loss.persons`: `{"PICTURE": [[left, top, right, bottom], ...]}`.
    Pictures are paths relative to the file's folder, and sides are fractions of the picture. Pictures that are not
    in the file have no known boxes."""

    def __post_init__(self) -> None:
        _check_folder_name(self.name)


@dataclass(frozen=True)
class EncoderTraining:
    """Where the encoder's weights come from, and which of them learn."""

    weights: str = "none"
    """`none`; `imagenet`; a shipped checkpoint by its name, such as `flickr8k`; or a file. See
    `captioner.network.encoder.load_encoder_weights`."""
    train_from: str = "none"
    """The first of the encoder's stages that learns, and all after it do; `all`: every one. The pictures are then
    read at every step. `none`: the encoder stays frozen, and its grids are computed once."""
    learning_rate: float = 1e-4
    """The highest of the stages that learn; it rises and falls as the decoder's does."""
    cache: str = "cache"
    """Folder of the grids of a frozen encoder."""
    mirrored: bool = True
    """Show a picture mirrored half of the time, unless one of its captions says left or right."""
    augment: bool = False
    """Show an encoder that learns another part of each picture every time, in slightly other colours; see
    `training.augment`."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"learning_rate: must be above 0 and at most 1, got {self.learning_rate}")
        if self.augment and not self.learns:
            raise ValueError(
                "augment: the grids of a frozen encoder are computed once, from pictures as they are; "
                "set train_from, or leave this false"
            )

    @property
    def learns(self) -> bool:
        """Whether any stage of the encoder learns."""
        return self.train_from != "none"


@dataclass(frozen=True)
class LossSettings:
    """What training makes small."""

    label_smoothing: float = 0.1
    """Share of the target given to all words alike (Szegedy et al. 2016, arXiv 1512.00567, section 7)."""
    doubly_stochastic: float = 0.1
    """Lambda of Show, Attend and Tell, equation 14. The penalty is the mean over captions and locations of
    (1 - the location's attention summed over the words)^2, and is added to the mean loss a word. (The paper
    sums over locations: its lambda is ours divided by L.)"""
    coverage: float = 1.0
    """Weight of the coverage loss (See et al. 2017, arXiv 1704.04368, equation 13), where there is coverage."""
    reinforce: float = 0.1
    """Weight of the reward for the locations that `hard` attention chose; lambda_r of Show, Attend and Tell,
    section 4.1."""
    entropy: float = 0.0
    """Weight of the entropy of its weights, which keeps it from settling early; lambda_e there. Without it, `hard`
    learned sooner where it was tried (docs/attention.md)."""
    sharpness: float = 0.0
    """Weight of the mean entropy of attention, in nats, which makes it sharp."""
    sharpness_rise: float = 0.5
    """Share of the run in which `sharpness` rises from 0 in a straight line. From random weights, attention that is
    made sharp at once settles on one cell before it has learned where to look. 0: all of it from the first step."""
    persons: float = 0.0
    """Weight of -log(attention inside of the persons' boxes), summed over the words that name a person and divided
    by the number of all words. Words of pictures without boxes are left out; see `DatasetSettings.boxes`. Attention
    was supervised like this by Liu et al. 2017, "Attention Correctness in Neural Image Captioning" (arXiv
    1605.09553)."""
    detectors: float = 0.0
    """Weight of word detectors, which learn from captions alone which words each cell shows, by noisy-OR over cells
    (Fang et al. 2015, arXiv 1411.4952, section 3). They exist in training only, for `detected` and for an encoder
    that learns."""
    detected: float = 0.0
    """Weight of -log(attention where the word's detector responds), for words that have a detector, summed and
    divided as for `persons`. The response of each cell is divided by the highest, and each word is weighted by the
    probability that the detector gives it in the picture."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: must be at least 0 and below 1, got {self.label_smoothing}")
        config.check_ranges(
            self,
            {
                **dict.fromkeys(("doubly_stochastic", "coverage", "reinforce", "entropy"), (0, 1000)),
                **dict.fromkeys(("sharpness", "persons", "detectors", "detected"), (0, 1000)),
                "sharpness_rise": (0, 1),
            },
        )
        if self.detected and not self.detectors:
            raise ValueError("detected: there are no detectors to learn from; set loss.detectors above 0")


@dataclass(frozen=True)
class SelfCriticalSettings:
    """Learning from captions of one's own, by their reward (Rennie et al. 2017, arXiv 1612.00563).

    The reward is CIDEr-D by the training captions of the picture; see `training.reward`. To begin with, the network
    must write well: see `TrainingSettings.start_from`.
    """

    samples: int = 5
    """Captions drawn for a picture, of up to `search.max_words` words."""
    baseline: Literal["greedy", "others"] = "others"
    """What a caption must beat to become likelier: the one of the likeliest words (Rennie et al.), or the mean of
    the picture's other samples (Luo 2020, arXiv 2003.09971)."""
    bleu: float = 0.0
    """How many times the caption's BLEU-4 is added to its CIDEr-D."""
    cross_entropy: float = 0.2
    """Share of `loss`, from people's captions, in what is made small: 0 to 1."""

    def __post_init__(self) -> None:
        least = 2 if self.baseline == "others" else 1
        if self.samples < least:
            raise ValueError(f"samples: must be at least {least} for this baseline, got {self.samples}")
        config.check_ranges(self, {"samples": (least, 1000), "bleu": (0, 1000), "cross_entropy": (0, 1)})


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), warmed up, then slowed down."""

    epochs: int = 10
    batch_size: int = 32
    """Pictures a step, each with all its captions, however many processes and parts share them."""
    accumulate: int = 1
    """Parts that each process computes its pictures of a step in, one after another, to need less memory; the step
    stays the same."""
    learning_rate: float = 8e-4
    """The highest."""
    warmup_steps: int = 200
    schedule: Literal["cosine", "plateau"] = "cosine"
    """How rates go down after warming up: along half a cosine to 0 (Loshchilov and Hutter 2017, arXiv 1608.03983),
    or by `plateau_factor` whenever `plateau_patience` epochs have not raised the best development score."""
    plateau_patience: int = 1
    plateau_factor: float = 0.5
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    """Longer gradients are scaled down to this length."""
    average_decay: float = 0.999
    """Of the moving average of the weights, which is what is evaluated and kept; 0 keeps the last weights."""

    def __post_init__(self) -> None:
        config.check_ranges(
            self,
            {
                "epochs": (1, MOST),
                "batch_size": (1, MOST),
                "accumulate": (1, MOST),
                "warmup_steps": (0, 1000 * MOST),
                "plateau_patience": (1, MOST),
                "weight_decay": (0, 1000),
            },
        )
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate: {self.batch_size} pictures make no {self.accumulate} parts")
        if not 0 < self.plateau_factor < 1:
            raise ValueError(f"plateau_factor: must be above 0 and below 1, got {self.plateau_factor}")
        for name, most in {"learning_rate": 1, "clip_norm": 1e9}.items():
            if not 0 < getattr(self, name) <= most:
                raise ValueError(f"{name}: must be above 0 and at most {most:g}, got {getattr(self, name)}")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay: must be at least 0 and below 1, got {self.average_decay}")


@dataclass(frozen=True)
class SelectionSettings:
    """Which checkpoints are kept, and when a run has learned enough."""

    metric: str = "CIDEr-D"
    """Of `evaluation.metrics.METRICS`. The mean over the data sets of what the development captions score is what
    the best checkpoint has the most of."""
    patience: int = 0
    """Epochs without a better score after which the run ends; 0: it never ends early."""
    keep_last: int = 0
    """Also keep the checkpoints of this many last epochs, `epoch-001.safetensors` and so on."""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            near = difflib.get_close_matches(self.metric, METRICS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METRICS)}"
            raise ValueError(f"metric: unknown {self.metric!r}; {hint}")
        config.check_ranges(self, {"patience": (0, MOST), "keep_last": (0, MOST)})


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides a run: the same settings and data give the same checkpoint."""

    datasets: tuple[DatasetSettings, ...]
    name: str
    """The run's folder is `runs/NAME`."""
    seed: int = 1
    device: str = "auto"
    min_count: int = 4
    """Words seen less often in the training captions are `<unk>`."""
    pieces: int = 0
    """Size of a vocabulary of subword pieces instead of words, which needs no `min_count`, and whose pieces are
    what `max_words` counts; 0: words. Languages that put no spaces between words, such as Thai, Chinese and
    Japanese, need pieces."""
    max_words: int = 24
    """Longer training captions are cut, and do not teach an end."""
    start_from: str = "none"
    """A checkpoint whose weights the run starts from: a shipped one by its name, such as `flickr8k`, or a file,
    such as `runs/flickr8k/best.safetensors`. It must have the model (but for dropout and
    `attention.normalize`) and the images of this run; words that it does not have begin with random weights.
    `none`: all weights are random."""
    scheduled_sampling: float = 0.0
    """Share of the words read in training that the decoder, a recurrent one, draws itself instead of reading the
    caption's, at the end of the run: it rises from 0 in a straight line (Bengio et al. 2015, arXiv 1506.03099,
    section 2.4)."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the network computes in while training; its weights, the loss and captioning stay float32. `float16` is
    for GPUs without `bfloat16`: its gradients are scaled to fit (Micikevicius et al. 2018, arXiv 1710.03740)."""
    compile: bool = False
    """Compile the network that trains with torch.compile, which takes a minute or more at the start. On a CPU steps
    became slower, 0.37 s to 0.5 s (additive attention, 80 captions); on a GPU not measured."""
    tensorboard: bool = False
    """Write what `log.jsonl` holds for TensorBoard, too, in the run's folder."""
    save_minutes: float = 5.0
    """How often the state to resume from is saved, within an epoch too."""
    model: ModelSettings = field(default_factory=ModelSettings)
    images: ImageSettings = field(default_factory=ImageSettings)
    encoder: EncoderTraining = field(default_factory=EncoderTraining)
    loss: LossSettings = field(default_factory=LossSettings)
    self_critical: SelfCriticalSettings | None = None
    """None: learn from people's captions alone."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    """How development captions are found."""
    selection: SelectionSettings = field(default_factory=SelectionSettings)
    card: dict[str, Any] = field(default_factory=dict)
    """For the model card in the checkpoint: sources, licences, limits, in words."""

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ValueError("datasets: name at least one")
        names = [dataset.name for dataset in self.datasets]
        if len(set(names)) < len(names):
            raise ValueError(f"datasets: each needs a name of its own, got {', '.join(names)}")
        _check_folder_name(self.name)
        config.check_ranges(
            self,
            {
                "seed": (0, 2**32 - 1),
                "min_count": (1, 1000 * MOST),
                "pieces": (0, MOST),
                "max_words": (1, 1000),
                "scheduled_sampling": (0, 1),
                "save_minutes": (0, MOST),
            },
        )
        try:
            json.dumps(self.card, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"card: expected text, numbers, true, false, lists and tables ({error})") from error
        if bool(self.loss.persons) != any(dataset.boxes for dataset in self.datasets):
            raise ValueError("loss.persons: needs the boxes of a data set, and boxes need loss.persons above 0")
        if self.loss.persons and self.images.frame != "stretch":
            raise ValueError("loss.persons: boxes of persons are for whole pictures; set images.frame to 'stretch'")
        if self.scheduled_sampling and self.model.decoder.kind == "transformer":
            raise ValueError(
                "scheduled_sampling: the 'transformer' decoder reads all words of a caption at once, before it has "
                "any of its own; set it to 0, or choose a recurrent decoder"
            )


def read_settings(file: Path, overrides: list[str]) -> TrainingSettings:
    """Return the settings of a TOML file, changed by overrides such as `optimizer.epochs=3`.

    Raises:
        ConfigError: with a line for each thing wrong.
    """
    source = escape_controls(str(file))
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{source}: no such configuration") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: cannot be read as TOML ({error})") from error
    for override in overrides:
        _override(values, override)
    try:
        _set_timm_images(values)
    except CaptionerError as error:
        raise ConfigError(f"{source}: {error}") from error
    settings = config.from_dict(TrainingSettings, values, source=source)
    try:
        with torch.device("meta"):  # parts that do not fit together are refused before any work
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
    """Change nested tables of settings by KEY=VALUE."""
    option = f"--set {escape_controls(override)}"
    path, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"{option}: expected KEY=VALUE, such as optimizer.epochs=3")
    try:
        override.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{option}: not UTF-8, as everything in a configuration must be") from None
    *tables, key = path.strip().split(".")
    table = values
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{option}: {name} is not a table")
    table[key] = _parse_value(value.strip(), _type_of([*tables, key]))


def _type_of(keys: list[str]) -> Any:
    """Return the type of the setting that a path of keys leads to; None: there is no such setting."""
    found: Any = TrainingSettings
    for key in keys:
        found = get_type_hints(found).get(key) if is_dataclass(found) else None
        if options := [option for option in get_args(found) if option is not type(None)]:
            found = options[0] if get_origin(found) in (Union, UnionType) else found
    return found


def _parse_value(text: str, expected: Any) -> Any:
    """Return the value that TOML reads.

    Text needs no quotes where a setting expects text (`name=2024`), and wherever TOML reads nothing else (a path).
    """
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    if values.keys() != {"value"} or (expected is str and not isinstance(values["value"], str)):
        return text
    return values["value"]


def expand_path(path: str) -> Path:
    """Return the path with its environment variables filled in.

    Raises:
        ConfigError: when one is not set, or this is no path.
    """
    if "\0" in path:
        raise ConfigError(f"{path!r}: no path has a NUL character in it")
    expanded = os.path.expandvars(path)
    if "$" in expanded:
        raise ConfigError(f"{path}: set the environment variable that this path names")
    try:
        return Path(expanded).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no such user, or it has no home folder") from error
