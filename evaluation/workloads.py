"""What `python -m evaluation speed` measures, each in a process of its own that runs this module.

    python -m evaluation.workloads NAME SETTINGS

prepares the workload of this name and does it once to warm up. It does it again for each line that it reads, and
answers in lines of JSON: seconds, or what is wrong, and at the end the memory. No data are needed: pictures are
drawn, grids are random numbers, and captions are made up.
"""

import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from captioner import config
from captioner.errors import CaptionerError
from evaluation.java import UnavailableError

if TYPE_CHECKING:  # torch would count as memory of workloads that do without
    from torch import Tensor

    from captioner.captioning import Captioner

Work = Callable[[], object]
"""Does a workload once."""


@dataclass(frozen=True)
class Sizes:
    """How much work a workload is. The training step has the sizes of the tutorial that `train` names, on COCO."""

    matrix: int = 2048
    pictures: int = 64
    images: int = 32  # of a training step, one caption each
    grid: tuple[int, int] = (14, 14)
    annotation: int = 2048
    width: int = 512  # of hidden state, embedding and attention
    vocabulary: int = 9490
    words: int = 12  # of the captions of a training step
    rewarded: int = 50  # captions
    scored: int = 5000  # pictures
    references: int = 5  # of each picture
    shortest: float = 0.2  # seconds: work that takes less is done several times in a row, and the mean counts


@dataclass(frozen=True)
class Settings:
    """What a workload is told."""

    folder: str  # for files it needs
    checkpoint: str = "default"  # as of `captioner.load`
    device: str = "auto"
    sizes: Sizes = field(default_factory=Sizes)


class Workload(NamedTuple):
    """Something to measure. Those of one group are compared with the first of it."""

    group: str
    title: str
    prepare: Callable[[Settings], Work]
    unit: str  # what the work is counted in
    amount: Callable[[Sizes], float]  # of them


def multiply(settings: Settings) -> Work:
    """A matrix product, by which the figures of different machines can be compared."""
    import torch

    from captioner.captioning import choose_device

    first, second = torch.randn(
        2, settings.sizes.matrix, settings.sizes.matrix, device=choose_device(settings.device)
    )
    return lambda: _await(first @ second)


def import_torch(settings: Settings) -> Work:
    """A Python that imports torch, and ends."""
    return lambda: _run("-c", "import torch")


def caption_picture(settings: Settings) -> Work:
    """The command `caption` for one picture, from its start to its end."""
    (picture,) = draw_pictures(Path(settings.folder), 1)
    return lambda: _run("-m", "captioner", str(picture), "-m", settings.checkpoint, "--device", settings.device)


def encode(settings: Settings) -> Work:
    """The encoder, of pictures that are read and prepared already."""
    import torch

    model, pixels = _prepare_pictures(settings)

    def work() -> None:
        with torch.inference_mode():
            annotations, _ = model.network.encoder(pixels)
            _await(annotations)

    return work


def caption_files(settings: Settings, beam_size: int) -> Work:
    """Captions for picture files, reading them included."""
    from captioner.captioning import load
    from captioner.search import SearchSettings

    model = load(settings.checkpoint, settings.device)
    pictures = draw_pictures(Path(settings.folder), settings.sizes.pictures)
    return lambda: model.caption(list(pictures), SearchSettings(beam_size=beam_size))


def decode(settings: Settings) -> Work:
    """Beam search alone, of pictures that are encoded already."""
    import torch

    from captioner.captioning import find_sentences
    from captioner.search import SearchSettings

    model, pixels = _prepare_pictures(settings)
    with torch.inference_mode():
        annotations, _ = model.network.encoder(pixels)
    return lambda: find_sentences(model.network.decoder, annotations, SearchSettings(), model.vocabulary)


def train(settings: Settings, project_at_every_word: bool) -> Callable[[], float]:
    """A training step of the decoder: forward, backward and AdamW. It returns the loss.

    With `project_at_every_word` the same maths in the order of a well-known tutorial, sgrvinod's
    "a-PyTorch-Tutorial-to-Image-Captioning": one word after another, output layer included, and at each the
    attention projects the whole picture again. Without dropout, so that both come to the same loss.
    """
    import torch
    import torch.nn.functional as F

    from captioner.attention import AttentionSettings
    from captioner.captioning import choose_device
    from captioner.decoder import DecoderSettings, build_decoder
    from captioner.vocabulary import SPECIAL

    sizes, device = settings.sizes, choose_device(settings.device)
    torch.manual_seed(0)
    decoder = build_decoder(
        DecoderSettings(hidden_size=sizes.width, embedding_size=sizes.width, dropout=0.0),
        AttentionSettings(size=sizes.width),
        sizes.annotation,
        sizes.grid,
        sizes.vocabulary,
    ).to(device)
    optimizer = torch.optim.AdamW(decoder.parameters())
    annotations = torch.randn(sizes.images, math.prod(sizes.grid), sizes.annotation, device=device)
    written = torch.randint(len(SPECIAL), sizes.vocabulary, (sizes.images, 1, sizes.words + 1), device=device)
    captions, targets = written[:, :, :-1], written[:, :, 1:]

    def forward() -> "Tensor":
        logits, _ = decoder(annotations, captions)
        return F.cross_entropy(logits, targets.flatten())

    def forward_word_by_word() -> "Tensor":
        state = decoder.start(annotations)
        losses: list[Tensor] = []
        for words, following in zip(captions.flatten(0, 1).T, targets.flatten(0, 1).T, strict=True):
            if losses:  # for the first word `start` has done it
                keys = decoder.attention.prepare(state.picture.annotations)
                state = state._replace(picture=state.picture._replace(keys=keys))
            log_probs, state, _ = decoder.step(words, state)
            losses.append(F.nll_loss(log_probs, following))
        return torch.stack(losses).mean()

    def work() -> float:
        loss = forward_word_by_word() if project_at_every_word else forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _await(decoder.output_bias)
        return loss.item()

    return work


def reward(settings: Settings) -> Work:
    """What self-critical training asks of captions that it drew: their CIDEr-D, by captions as numbers."""
    import numpy as np

    from captioner.vocabulary import Vocabulary
    from evaluation.ngrams import NgramTable, cider_d, pad

    sizes = settings.sizes
    texts = make_captions(sizes.scored, sizes.references + 1)
    vocabulary = Vocabulary.build([text for several in texts for text in several], min_count=1)
    drawn = pad([vocabulary.encode(several[-1]) for several in texts[: sizes.rewarded]])
    references = pad([vocabulary.encode(text) for several in texts for text in several[:-1]])
    pictures = np.repeat(np.arange(sizes.scored), sizes.references)
    table = NgramTable(references, pictures)
    shown = pictures < sizes.rewarded

    def work() -> None:
        ours = table.weigh(drawn, np.arange(len(drawn)))
        cider_d(ours, table.weigh(references[shown], pictures[shown]))

    return work


def score(settings: Settings) -> Work:
    """BLEU, ROUGE-L and CIDEr-D of raw captions by ours, tokenizing included."""
    from evaluation.metrics import Scorer

    texts = make_captions(settings.sizes.scored, settings.sizes.references + 1)
    references = {number: several[:-1] for number, several in enumerate(texts)}
    candidates = {number: several[-1] for number, several in enumerate(texts)}
    return lambda: Scorer(references).score(candidates)


def score_by_coco_caption(settings: Settings) -> Work:
    """The same by pycocoevalcap, if it is there and a Java, too."""
    import shutil

    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError as error:
        raise UnavailableError(f"{error}; pip install 'captioner[meteor]'") from error
    if shutil.which("java") is None:
        raise UnavailableError("there is no java; install a Java runtime, 8 or later")
    if PTBTokenizer().tokenize({0: [{"caption": "A dog."}]}) != {0: ["a dog"]}:
        raise UnavailableError("its tokenizer does not run")
    texts = make_captions(settings.sizes.scored, settings.sizes.references + 1)
    references = {number: [{"caption": text} for text in several[:-1]] for number, several in enumerate(texts)}
    candidates = {number: [{"caption": several[-1]}] for number, several in enumerate(texts)}

    def work() -> None:
        tokenizer = PTBTokenizer()
        theirs, ours = tokenizer.tokenize(references), tokenizer.tokenize(candidates)
        Bleu(4).compute_score(theirs, ours, verbose=0)
        Rouge().compute_score(theirs, ours)
        Cider().compute_score(theirs, ours)

    return work


def _one(sizes: Sizes) -> float:
    return 1


def _pictures(sizes: Sizes) -> float:
    return sizes.pictures


def _images(sizes: Sizes) -> float:
    return sizes.images


def _scored(sizes: Sizes) -> float:
    return sizes.scored


WORKLOADS = {
    "machine/product": Workload(
        "machine", "matrix product, float32", multiply, "GFLOP", lambda sizes: 2 * sizes.matrix**3 / 1e9
    ),
    "start-up/torch": Workload("start-up", "python -c 'import torch'", import_torch, "starts", _one),
    "start-up/caption": Workload("start-up", "python -m captioner PICTURE", caption_picture, "starts", _one),
    "captioning/encoder": Workload("captioning", "encoder alone", encode, "pictures", _pictures),
    "captioning/greedy": Workload(
        "captioning", "files, greedy", lambda settings: caption_files(settings, 1), "pictures", _pictures
    ),
    "captioning/beam": Workload(
        "captioning", "files, beam of 5", lambda settings: caption_files(settings, 5), "pictures", _pictures
    ),
    "captioning/decoder": Workload("captioning", "decoder alone, beam of 5", decode, "pictures", _pictures),
    "step/ours": Workload("step", "training step", lambda settings: train(settings, False), "captions", _images),
    "step/projecting": Workload(
        "step", "projecting at every word", lambda settings: train(settings, True), "captions", _images
    ),
    "reward/ours": Workload("reward", "self-critical reward", reward, "captions", lambda sizes: sizes.rewarded),
    "scoring/ours": Workload("scoring", "BLEU, ROUGE-L, CIDEr-D", score, "pictures", _scored),
    "scoring/pycocoevalcap": Workload("scoring", "by pycocoevalcap", score_by_coco_caption, "pictures", _scored),
}

GROUPS = tuple(dict.fromkeys(workload.group for workload in WORKLOADS.values()))


def draw_pictures(folder: Path, count: int) -> Sequence[Path]:
    """Draw photograph-like pictures, 500 x 375, always the same, and return their JPEG files."""
    from PIL import Image, ImageDraw, ImageFilter

    paths = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        paths.append(path)
        if path.exists():
            continue
        numbers = random.Random(number)
        grain = Image.frombytes("RGB", (250, 188), numbers.randbytes(250 * 188 * 3)).resize((500, 375))
        picture = Image.new("RGB", (500, 375), tuple(numbers.randbytes(3)))
        pencil = ImageDraw.Draw(picture)
        for _ in range(12):
            x, y = numbers.randrange(500), numbers.randrange(375)
            width, height = numbers.randint(20, 200), numbers.randint(20, 200)
            pencil.ellipse((x, y, x + width, y + height), fill=tuple(numbers.randbytes(3)))
        picture = Image.blend(picture.filter(ImageFilter.GaussianBlur(2)), grain, 0.15)
        picture.save(path, quality=90)
    return paths


def make_captions(pictures: int, each: int) -> list[list[str]]:
    """Make up captions of about ten words, always the same, whose words are as unevenly frequent as people's.

    Zipf 1949: the n-th most frequent of 10,000 words occurs 1 / n times as often as the first. The captions of a
    picture have words in common; they begin with a capital, most end in a full stop, and some words are joined
    or inflected.
    """
    numbers = random.Random(0)
    syllables = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    words = [
        syllables[number % 70]
        + syllables[number // 70 % 70]
        + (syllables[number // 4900] if number >= 4900 else "")
        for number in range(10_000)
    ]
    cumulative: list[float] = []
    for number in range(len(words)):
        cumulative.append((cumulative[-1] if cumulative else 0) + 1 / (number + 1))

    def write(subject: list[str]) -> str:
        chosen = numbers.choices(words, cum_weights=cumulative, k=numbers.randint(7, 13))
        for place, word in enumerate(chosen):
            if numbers.random() < 0.4:
                chosen[place] = subject[place]
            elif numbers.random() < 0.03:
                chosen[place] = word + numbers.choice([",", "'s", f"-{chosen[0]}"])
        return " ".join(chosen).capitalize() + numbers.choice([".", ".", " .", ""])

    subjects = (numbers.choices(words, cum_weights=cumulative, k=13) for _ in range(pictures))
    return [[write(subject) for _ in range(each)] for subject in subjects]


def _prepare_pictures(settings: Settings) -> tuple["Captioner", "Tensor"]:
    """Return the captioner, and pictures as its encoder takes them."""
    import torch

    from captioner import images
    from captioner.captioning import load

    model = load(settings.checkpoint, settings.device)
    pictures = [images.open(path) for path in draw_pictures(Path(settings.folder), settings.sizes.pictures)]
    pixels = [images.prepare(picture, model.header.images)[0] for picture in pictures]
    return model, torch.stack(pixels).to(model.device)


def _await(result: "Tensor") -> None:
    """Wait until a result is there: devices other than the CPU work while Python goes on."""
    result.flatten()[0].item()


def _run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise CaptionerError(
            f"`python {arguments[0]} {arguments[1]}` failed: {(done.stderr.splitlines() or ['?'])[-1]}"
        )


def measure(work: Work, times: int = 1) -> dict[str, float]:
    """Return the seconds and the processor's seconds, those of ended child processes included, of doing it once.

    Args:
        work: what to do.
        times: how often in a row; the mean counts.
    """
    cpu, started = _cpu_seconds(), time.perf_counter()
    for _ in range(times):
        work()
    seconds, cpu = time.perf_counter() - started, _cpu_seconds() - cpu
    return {"seconds": seconds / times, "cpu_seconds": cpu / times}


def _cpu_seconds() -> float:
    import resource  # which Windows does not have

    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _peak_mb() -> float:
    """Return the most memory that this process, or any of its children, ever held: megabytes of 2^20 bytes."""
    import resource

    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where the figure above begins with what the process held that started this one
        own = int(status.read_text().partition("VmHWM:")[2].split()[0]) / (1 << 10)
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit)


def main() -> None:
    """Do the workload that the command line names; see the module."""
    name, settings_as_json = sys.argv[1:]
    settings = config.from_dict(Settings, json.loads(settings_as_json))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer

    def answer(values: dict[str, object]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        work = WORKLOADS[name].prepare(settings)
        once = measure(work)
    except UnavailableError as error:
        return answer({"unavailable": str(error)})
    except CaptionerError as error:
        return answer({"error": str(error)})
    answer({})
    times = math.ceil(settings.sizes.shortest / max(once["seconds"], 1e-6))
    for _ in sys.stdin:
        answer(dict(measure(work, max(1, times))))
    return answer({"peak_mb": _peak_mb()})


if __name__ == "__main__":
    main()
