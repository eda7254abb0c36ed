import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from captioner.captioning import find_sentences
from captioner.errors import CheckpointError, ConfigError
from captioner.network.checkpoint import load_checkpoint
from captioner.network.decoder import build_decoder
from captioner.network.engine import TorchEngine
from captioner.network.model import CaptioningNetwork
from captioner.search import SearchSettings
from captioner.settings import AttentionSettings, DecoderSettings
from captioner.vocabulary import END, PAD, SPECIAL, START, UNKNOWN, Vocabulary
from training.batches import Batch, Share
from training.check import check
from training.config import DatasetSettings, LossSettings, SelfCriticalSettings
from training.losses import CaptionLoss
from training.reward import CaptionReward
from training.self_critical import SelfCriticalLoss, policy_loss, write_captions
from training.start import resume_run, start_run

V = 9
NEVER = [PAD, START, UNKNOWN]
KINDS = {
    "lstm": (DecoderSettings("lstm"), AttentionSettings("additive")),
    "gru after": (DecoderSettings("gru", attend="after"), AttentionSettings("general")),
    "coverage": (DecoderSettings("lstm"), AttentionSettings("additive", coverage=True)),
    "top down": (DecoderSettings("top_down"), AttentionSettings("additive")),
    "transformer": (DecoderSettings("transformer"), AttentionSettings("multi_head", heads=2)),
    "hard": (DecoderSettings("lstm"), AttentionSettings("hard")),
}
WORDS = (*SPECIAL, "man", "boy", "dog", "street", "on")
REFERENCES = [[[4, 5, 6, END], [4, 5, END]], [[7, 8, END], [7, END]], [[4, 8, 6, END], [5, 5, END]]]


def make(kind, dropout=0.0):
    """A decoder in training mode that prefers some words, and the annotations of three pictures."""
    torch.manual_seed(0)
    decoder, attention = KINDS[kind]
    decoder = replace(decoder, hidden_size=8, embedding_size=8, dropout=dropout)
    decoder = build_decoder(decoder, replace(attention, size=8), 6, (2, 2), V)
    torch.nn.init.normal_(decoder.output_bias)
    return decoder.train(), torch.randn(3, 4, 6)


def likelihoods(decoder, annotations, written):
    """The log-probability (B, K) of captions, one step after another, of words that may be written."""
    images, columns, steps = written.shape
    state = decoder.start(annotations).expand(columns)
    words = torch.full((images, columns), START)
    total = torch.zeros(images, columns)
    for time in range(steps):
        log_probs, state, _ = decoder.step(words, state)
        log_probs = log_probs.index_fill(2, torch.tensor(NEVER), -torch.inf).log_softmax(dim=2)
        words = written[:, :, time]
        total = total + torch.where(words == PAD, 0, log_probs.gather(2, words[..., None].clamp(END)).squeeze(2))
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_captions_contain_only_words_until_the_end(kind):
    decoder, annotations = make(kind, dropout=0.5)
    written = write_captions(decoder, annotations, samples=40, max_words=6)
    assert written.shape[:2] == (3, 40)
    assert decoder.training
    lengths = set()
    for caption in written.flatten(0, 1).tolist():
        words = [word for word in caption if word != PAD]
        assert caption == words + [PAD] * (len(caption) - len(words))
        assert not set(words) & set(NEVER)
        assert END not in words[:-1]
        assert words[-1] == END or len(words) == 7
        lengths.add(len(words))
    assert len(lengths) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_greedy_caption_is_that_of_a_beam_of_one(kind):
    decoder, annotations = make(kind, dropout=0.5)
    greedy = write_captions(decoder, annotations, samples=2, max_words=6, greedy=True)[:, 2].tolist()
    settings = SearchSettings(beam_size=1, max_words=6, min_words=0, repeat_size=0)
    engine = TorchEngine(CaptioningNetwork(torch.nn.Identity(), decoder.eval(), (2, 2)))
    state = engine.start_from(annotations)
    sentences = find_sentences(engine, state, len(annotations), settings, Vocabulary([*SPECIAL, *"abcde"]))
    for caption, found in zip(greedy, sentences, strict=True):
        words = [word for word in caption if word not in (PAD, END)]
        # The search ends a sentence that would not end where its score is best.
        assert found[0].words == words[: len(found[0].words)]
        assert END not in caption or len(found[0].words) == len(words)


def test_captions_are_sampled_with_their_probability():
    decoder, annotations = make("lstm", dropout=0.5)
    written = write_captions(decoder, annotations, samples=20_000, max_words=1)
    for image, captions in enumerate(written):
        found, counts = captions.unique(dim=0, return_counts=True)
        expected = likelihoods(decoder.eval(), annotations[image : image + 1], found[None]).exp()[0]
        assert expected.sum() > 0.99
        # Four standard deviations of a share of 20,000.
        assert ((counts / 20_000 - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt() + 1e-4).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hard"])
def test_the_loss_is_the_advantage_times_the_log_probability_of_each_caption(kind):
    decoder, annotations = make(kind)
    written = write_captions(decoder, annotations, samples=4, max_words=6)
    advantages = torch.randn(3, 4)
    loss = policy_loss(decoder, annotations, written, advantages)
    expected = -(advantages * likelihoods(decoder, annotations, written)).sum() / (written != PAD).sum()
    torch.testing.assert_close(loss, expected)
    for found, other in zip(
        *(torch.autograd.grad(item, decoder.parameters(), allow_unused=True) for item in (loss, expected)),
        strict=True,
    ):
        assert (found is None) == (other is None)
        if found is not None:
            torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_on_average_that_of_the_expected_reward():
    """The REINFORCE identity, over every caption of up to one word there is, whatever the baseline."""
    decoder, annotations = make("lstm")
    annotations = annotations[:1]
    words = [word for word in range(V) if word not in (*NEVER, END)]
    every = [[END, PAD], *([word, after] for word in words for after in (END, *words))]
    written, rewards = torch.tensor([every]), torch.rand(1, len(every))
    probabilities = likelihoods(decoder, annotations, written).exp()
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0))
    advantages = probabilities.detach() * (rewards - 0.3)
    loss = policy_loss(decoder, annotations, written, advantages) * (written != PAD).sum()
    (found,) = torch.autograd.grad(loss, decoder.output_bias)
    (expected,) = torch.autograd.grad(-(probabilities * rewards).sum(), decoder.output_bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_padding_for_a_longer_greedy_caption_does_not_change_the_loss():
    decoder, annotations = make("lstm")
    written = torch.tensor([[[4, END], [5, END]]] * 3)
    advantages = torch.tensor([[1.0, -1.0]] * 3)
    loss = policy_loss(decoder, annotations, written, advantages)
    torch.testing.assert_close(policy_loss(decoder, annotations, F.pad(written, (0, 3)), advantages), loss)


def make_batch(annotations):
    captions = torch.tensor([[[START, 4, 5]], [[START, 7, PAD]], [[START, 4, 8]]])
    targets = torch.tensor([4, 5, END, 7, END, 4, 8, END])
    return Batch(annotations, captions, targets, torch.tensor([0, 1, 2]), Share())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("baseline", ["greedy", "others"])
def test_the_loss_uses_the_baseline_and_mixes_in_reference_captions(kind, baseline):
    decoder, annotations = make(kind)
    batch = make_batch(annotations)
    settings = SelfCriticalSettings(3, baseline, bleu=0.5, unconfirmed=0.5, cross_entropy=0.3)
    loss_of = SelfCriticalLoss(settings, REFERENCES, CaptionLoss(LossSettings()), max_words=5, words=WORDS)
    torch.manual_seed(7)
    loss, parts = loss_of(decoder, annotations, batch)

    torch.manual_seed(7)
    greedy = baseline == "greedy"
    written = write_captions(decoder, annotations, 3, 5, greedy=greedy)
    reward = CaptionReward(REFERENCES, 0.5, unconfirmed=0.5, words=WORDS)
    rewards = torch.tensor(
        [reward.score(np.full(len(entry), image), entry.numpy()).tolist() for image, entry in enumerate(written)]
    )
    drawn = rewards[:, :3]
    if greedy:
        expected = rewards[:, 3:].expand(-1, 3)
    else:
        expected = torch.stack([drawn[:, [1, 2]], drawn[:, [0, 2]], drawn[:, [0, 1]]], dim=1).mean(dim=2)
    critical = policy_loss(decoder, annotations, written[:, :3], drawn - expected)
    of_people, _ = CaptionLoss(LossSettings())(decoder, annotations, batch)
    torch.testing.assert_close(loss, 0.7 * critical + 0.3 * of_people)
    assert parts["reward"] == pytest.approx(drawn.mean().item(), abs=1e-6)
    assert parts["baseline"] == pytest.approx(expected.mean().item(), abs=1e-6)
    lengths = [sum(word not in (PAD, END) for word in item) for item in written[:, :3].flatten(0, 1).tolist()]
    assert parts["length"] == pytest.approx(sum(lengths) / len(lengths))
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in decoder.parameters() if weight.grad is not None)


def test_without_cross_entropy_references_only_affect_the_reward():
    decoder, annotations = make("lstm")
    settings = SelfCriticalSettings(samples=3, cross_entropy=0.0)
    loss, parts = SelfCriticalLoss(settings, REFERENCES, CaptionLoss(LossSettings()), 5)(
        decoder, annotations, make_batch(annotations)
    )
    assert loss.item() == pytest.approx(parts["critical"])
    assert parts.keys() == {"critical", "reward", "baseline", "length"}


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["greedy", "others"])
@pytest.mark.parametrize("kind", ["lstm", "transformer", "hard"])
def test_steps_along_the_gradient_raise_the_reward(kind, baseline):
    decoder, annotations = make(kind)
    settings = SelfCriticalSettings(samples=5, baseline=baseline, cross_entropy=0.0)
    loss_of = SelfCriticalLoss(settings, REFERENCES, CaptionLoss(LossSettings()), max_words=5)
    optimizer = torch.optim.Adam(decoder.parameters(), 0.01)
    rewards = []
    for _ in range(100):
        loss, parts = loss_of(decoder, annotations, make_batch(annotations))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(parts["reward"])
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 1}, "samples: must be at least 2 for this baseline"),
        ({"samples": 0, "baseline": "greedy"}, "samples: must be at least 1"),
        ({"cross_entropy": 1.5}, "cross_entropy: must be at least 0 and at most 1"),
        ({"bleu": -1.0}, "bleu: must be at least 0"),
    ],
)
def test_contradicting_settings_are_rejected(values, message):
    with pytest.raises(ValueError, match=message):
        SelfCriticalSettings(**values)


@pytest.fixture
def first(settings, tmp_path):
    """A trained run, and the settings of a self-critical run that starts from it."""
    run = start_run(replace(settings, name="first"), tmp_path / "runs")
    run.train()
    start = str(run.folder / "best.safetensors")
    return run, replace(settings, start_from=start, self_critical=SelfCriticalSettings(samples=3))


def test_a_run_starts_from_the_weights_of_another_and_is_scored_before_its_first_step(first, tmp_path):
    before, settings = first
    decoder = replace(settings.model.decoder, dropout=0.3, annotation_dropout=0.1)  # neither has weights
    model = replace(settings.model, decoder=decoder)
    run = start_run(replace(settings, model=model), tmp_path / "runs")
    stored, _ = load_checkpoint(before.folder / "best.safetensors")
    for name, weight in stored.decoder.state_dict().items():
        assert torch.equal(run.network.decoder.state_dict()[name], weight)
    run.train()
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    scores = {line["epoch"]: line["scores"] for line in lines if "scores" in line}
    assert list(scores) == [0, 1, 2, 3]
    assert scores[0]["colours"]["CIDEr-D"] == pytest.approx(before.best, abs=0.05)  # weights are stored in 16 bits
    assert run.best == max(entry["colours"]["CIDEr-D"] for entry in scores.values())


def test_a_run_that_starts_from_another_uses_its_grids(first, settings, tmp_path):
    start_run(replace(first[1], name="second"), tmp_path / "runs")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_start_from_loads_the_encoder_too(learning, tmp_path):
    before = start_run(replace(learning, name="first"), tmp_path / "runs")
    before.train()
    settings = replace(
        learning,
        start_from=str(before.folder / "best.safetensors"),
        encoder=replace(learning.encoder, train_from="none"),
    )
    encoder = start_run(settings, tmp_path / "runs").network.encoder
    stored, _ = load_checkpoint(before.folder / "best.safetensors")
    for actual, reference_values in zip(encoder.parameters(), stored.encoder.parameters(), strict=True):
        assert torch.equal(actual, reference_values)
        assert not actual.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("decoder", r"has model\.decoder\.hidden_size = 48, and this run has 32. Set it to 48"),
        ("attention", r"has model\.attention\.kind = 'additive', and this run has 'concat'"),
        ("images", r"has images\.size = 64, and this run has 96"),
    ],
)
def test_a_start_with_other_settings_is_rejected(first, tmp_path, change, message):
    settings = first[1]
    model = settings.model
    changes = {
        "decoder": {"model": replace(model, decoder=replace(model.decoder, hidden_size=32))},
        "attention": {"model": replace(model, attention=replace(model.attention, kind="concat"))},
        "images": {"images": replace(settings.images, size=96)},
    }
    with pytest.raises(ConfigError, match=message):
        start_run(replace(settings, **changes[change]), tmp_path / "runs")


def test_known_words_keep_their_weights_and_new_words_are_unlikely(first, dataset, tmp_path):
    before, settings = first
    text = dataset.read_text().replace("snow", "sleet").replace("grass", "moss")
    (dataset.parent / "other.jsonl").write_text(text)
    datasets = (DatasetSettings("other", "jsonl", str(dataset.parent / "other.jsonl")),)
    run = start_run(replace(settings, datasets=datasets), tmp_path / "runs")
    old, new = before.vocabulary.words, run.vocabulary.words
    assert set(new) - set(old) == {"sleet", "moss"}
    stored = load_checkpoint(before.folder / "best.safetensors")[0].decoder.state_dict()
    weights = run.network.decoder.state_dict()
    for name in ("embedding.weight", "output_weight", "output_bias"):
        for word in set(new) & set(old):
            assert torch.equal(weights[name][new.index(word)], stored[name][old.index(word)])
    for word in ("sleet", "moss"):
        assert weights["output_bias"][new.index(word)] == stored["output_bias"].min()
        assert weights["embedding.weight"][new.index(word)].norm() > 0.5
    assert "start_from: 2 of the" in "\n".join(check(replace(settings, datasets=datasets)))


def test_a_start_without_common_words_is_rejected(first, dataset, tmp_path):
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    for row in rows:
        row["captions"] = ["sleet"]
    file = dataset.parent / "other.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets = (DatasetSettings("other", "jsonl", str(file)),)
    with pytest.raises(ConfigError, match=r"has none of the 5 words of this run"):
        start_run(replace(first[1], datasets=datasets), tmp_path / "runs")


def test_a_missing_start_is_rejected(settings, tmp_path):
    settings = replace(settings, start_from=str(tmp_path / "nowhere.safetensors"))
    for work in (lambda: start_run(settings, tmp_path / "runs"), lambda: list(check(settings))):
        with pytest.raises(CheckpointError, match=r"nowhere\.safetensors: no such checkpoint"):
            work()


@pytest.mark.slow
def test_an_interrupted_self_critical_run_resumes_to_the_same_weights(first, tmp_path, stop_before_step):
    settings = replace(first[1], save_minutes=0)
    whole = start_run(settings, tmp_path / "whole")
    whole.train()
    run = start_run(settings, tmp_path / "broken")
    stop_before_step(run, 3)
    resumed = resume_run(run.folder)
    resumed.train()
    for name, tensor in whole.averaged.state_dict().items():
        assert torch.equal(tensor, resumed.averaged.state_dict()[name]), name


def test_a_check_measures_self_critical_steps(first, monkeypatch):
    _, settings = first
    drawn = []

    def note(decoder, annotations, *arguments, **options):
        drawn.append(len(annotations))
        return write_captions(decoder, annotations, *arguments, **options)

    monkeypatch.setattr("training.self_critical.write_captions", note)
    lines = list(check(settings))
    pictures = re.search(r"^step: (\d+) pictures", "\n".join(lines), re.MULTILINE)
    assert pictures
    assert set(drawn) == {int(pictures[1])}
