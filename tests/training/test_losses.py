import math

import pytest
import torch

from captioner.network.attention import Attended
from captioner.vocabulary import PAD
from training.batches import Batch, Share
from training.config import LossSettings
from training.losses import CaptionLoss, caption_numbers, doubly_stochastic_penalty, mean_entropy

CAPTIONS = torch.tensor([[[1, 4, 5], [1, 6, PAD]], [[1, PAD, PAD], [PAD, PAD, PAD]]])
OWNERS = [0, 0, 0, 1, 1, 2]  # the caption of each of their words
LENGTHS = [3, 2, 1]
TARGETS = torch.tensor([4, 5, 2, 6, 2, 2])


def make(seed=0, **members):
    """Logits and a look at three locations for each word of CAPTIONS."""
    torch.manual_seed(seed)
    return torch.randn(6, 8), Attended(torch.rand(6, 3).softmax(dim=-1), **members)


def compute(loss_of, logits, look, captions=CAPTIONS, targets=TARGETS, share=Share(), **known):  # noqa: B008
    """The loss, and its terms, of a decoder that returns these logits and this look."""
    batch = Batch(None, captions, targets, None, share, known.get("persons"))
    return loss_of(lambda *_: (logits, look), known.get("annotations"), batch, known.get("progress", 1.0))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_words_are_assigned_to_their_captions():
    assert caption_numbers(CAPTIONS).tolist() == OWNERS


def test_the_penalty_equals_the_papers_sum_divided_by_the_locations():
    _, look = make()
    sums = [[sum(float(alpha[i]) for alpha in item) for i in range(3)] for item in look.weights.split(LENGTHS)]
    expected = mean(mean((1 - total) ** 2 for total in item) for item in sums)
    assert doubly_stochastic_penalty(look.weights, torch.tensor(OWNERS)).item() == pytest.approx(expected)


def test_full_coverage_has_no_penalty():
    assert doubly_stochastic_penalty(torch.eye(5), torch.zeros(5, dtype=torch.long)).item() == 0


def test_the_loss_is_the_mean_over_words_plus_the_weighted_penalty():
    logits, look = make()
    loss, parts = compute(CaptionLoss(LossSettings(label_smoothing=0.2, doubly_stochastic=0.5)), logits, look)
    log_probs = logits.log_softmax(dim=-1)
    words = mean(
        0.8 * -log_probs[row, target] + 0.2 * -log_probs[row].mean() for row, target in enumerate(TARGETS.tolist())
    )
    assert parts.keys() == {"words", "attention"}
    assert parts["words"] == pytest.approx(words.item())
    penalty = doubly_stochastic_penalty(look.weights, torch.tensor(OWNERS)).item()
    assert parts["attention"] == pytest.approx(0.5 * penalty)
    assert loss.item() == pytest.approx(parts["words"] + parts["attention"])


def test_the_coverage_loss_is_the_mean_overlap():
    """See et al. 2017, equation 13."""
    overlap = torch.tensor([0.0, 0.2, 0.7, 0.0, 0.4, 0.0])
    loss, parts = compute(CaptionLoss(LossSettings(coverage=2.0)), *make(overlap=overlap))
    assert parts["coverage"] == pytest.approx(2 * 1.3 / 6)
    assert loss.item() == pytest.approx(sum(parts.values()))


def test_entropy_is_rewarded_for_hard_attention():
    logits, look = make(choice=torch.zeros(6))
    loss, parts = compute(CaptionLoss(LossSettings(entropy=0.3)), logits, look)
    entropy = mean(sum(-float(alpha * alpha.log()) for alpha in row) for row in look.weights)
    assert parts["entropy"] == pytest.approx(-0.3 * entropy)
    assert loss.item() == pytest.approx(sum(parts.values()))


def test_sharpness_is_the_mean_entropy_and_rises_linearly():
    logits, look = make()
    entropy = mean(sum(-float(alpha * alpha.log()) for alpha in row) for row in look.weights)
    loss_of = CaptionLoss(LossSettings(sharpness=0.3, sharpness_rise=0.4))
    for progress, share in ((0.0, 0.0), (0.1, 0.25), (0.4, 1.0), (0.9, 1.0)):
        _, parts = compute(loss_of, logits, look, progress=progress)
        assert parts["sharpness"] == pytest.approx(0.3 * share * entropy)
    at_once = CaptionLoss(LossSettings(sharpness=0.3, sharpness_rise=0.0))
    assert compute(at_once, logits, look, progress=0.0)[1]["sharpness"] == pytest.approx(0.3 * entropy)


def test_sharpness_has_a_gradient_where_weights_are_zero():
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], requires_grad=True)
    entropy = mean_entropy(weights)
    assert entropy.item() == pytest.approx(math.log(2) / 2)
    entropy.backward()
    assert weights.grad.isfinite().all()


def test_attention_outside_boxes_is_penalized_for_words_that_name_a_person():
    """Words 4 and 6 name persons; the second picture has no boxes."""
    logits, look = make()
    persons = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    targets = torch.tensor([4, 5, 2, 6, 2, 4])
    supervised = CaptionLoss(LossSettings(persons=0.7), persons=[4, 6])
    loss, parts = compute(supervised, logits, look, targets=targets, persons=persons)
    inside = [float(look.weights[row, 0] + 0.5 * look.weights[row, 1]) for row in (0, 3)]
    assert parts["persons"] == pytest.approx(-0.7 * sum(math.log(0.99 * mass + 0.01) for mass in inside) / 6)
    assert loss.item() == pytest.approx(sum(parts.values()))


def test_detectors_learn_by_noisy_or_which_words_captions_have():
    """Fang et al. 2015, section 3: a picture has a word unless none of its cells shows it."""
    logits, look = make()
    loss_of = CaptionLoss(LossSettings(detectors=0.4), words=[4, 5, 6], annotation_size=5)
    torch.nn.init.normal_(loss_of.detectors.weight)
    annotations = torch.randn(2, 3, 5)
    _, parts = compute(loss_of, logits, look, annotations=annotations)
    cells = loss_of.detectors(torch.nn.functional.layer_norm(annotations, (5,))).sigmoid().tolist()
    expected = 0.0
    for image, there in enumerate(({4, 5, 6}, set())):
        for index, word in enumerate((4, 5, 6)):
            absent = math.prod(1 - cell[index] for cell in cells[image])
            expected -= math.log(1 - absent if word in there else absent) / 2
    assert parts["detectors"] == pytest.approx(0.4 * expected, rel=1e-5)


def test_detectors_supervise_attention_without_gradient():
    logits, look = make()
    loss_of = CaptionLoss(LossSettings(detectors=1e-9, detected=0.6), words=[5, 6], annotation_size=5)
    torch.nn.init.normal_(loss_of.detectors.weight)
    annotations = torch.randn(2, 3, 5)
    look.weights.requires_grad_()
    loss, parts = compute(loss_of, logits, look, annotations=annotations)
    cells = loss_of.detectors(torch.nn.functional.layer_norm(annotations, (5,))).sigmoid().detach()
    expected = 0.0
    for row, index in ((1, 0), (3, 1)):  # targets 5 and 6, both of the first picture
        shows = cells[0, :, index]
        mass = (look.weights[row].detach() * shows / shows.max()).sum()
        expected -= float((1 - (1 - shows).prod()) * (0.99 * mass + 0.01).log())
    assert parts["detected"] == pytest.approx(0.6 * expected / 6, rel=1e-5)
    loss.backward()
    assert look.weights.grad[[1, 3]].any(dim=1).all()
    assert loss_of.detectors.weight.grad.abs().max() < 1e-6


def test_choices_are_rewarded_by_the_likelihood_above_the_baseline():
    """Show, Attend and Tell, section 4.1: over three batches, with the gradient of every choice and logit."""
    settings = LossSettings(label_smoothing=0.1, doubly_stochastic=0.0, entropy=0.0, reinforce=0.5)
    loss_of = CaptionLoss(settings)
    baseline = None
    for batch in range(3):
        logits, look = make(batch, choice=-torch.rand(6))
        logits.requires_grad_()
        look.choice.requires_grad_()
        loss, parts = compute(loss_of, logits, look)
        likelihood = logits.detach().log_softmax(dim=1)[range(6), TARGETS].tolist()
        rewards = [mean(likelihood[row] for row in range(6) if OWNERS[row] == number) for number in range(3)]
        baseline = mean(rewards) if baseline is None else baseline
        advantages = [rewards[owner] - baseline for owner in OWNERS]
        choice = look.choice.tolist()
        assert parts["choice"] == pytest.approx(
            -0.5 * mean(a * c for a, c in zip(advantages, choice, strict=True)), rel=1e-5
        )
        loss.backward()
        assert look.choice.grad.tolist() == pytest.approx([-advantage / 12 for advantage in advantages], abs=1e-6)
        # The reward itself is no way to learn: logits change for the sake of the words alone.
        without_choice = logits.detach().requires_grad_()
        torch.nn.functional.cross_entropy(without_choice, TARGETS, label_smoothing=0.1).backward()
        torch.testing.assert_close(logits.grad, without_choice.grad)
        baseline = 0.9 * baseline + 0.1 * mean(rewards)
        loss_of.end_step()
        assert loss_of.baseline.item() == pytest.approx(baseline)


def test_the_losses_and_gradients_of_a_steps_parts_add_up_to_those_of_the_whole():
    """The first picture, with five words in two captions, and the second, with one."""
    settings = LossSettings(0.1, entropy=0.3, sharpness=0.2, persons=0.4, detectors=0.5, detected=0.6)
    taught = {"persons": [4], "words": [2, 5, 6], "annotation_size": 5}
    persons, annotations = torch.rand(2, 3), torch.randn(2, 3, 5)
    rows, parts = [slice(0, 5), slice(5, 6)], []
    logits, look = make(choice=-torch.rand(6), overlap=torch.rand(6))
    whole, split = CaptionLoss(settings, **taught), CaptionLoss(settings, **taught)
    for loss_of in (whole, split):  # the first step knows no earlier one
        loss_of.baseline.fill_(-2.0)
        loss_of.begun.fill_(True)
    inputs = [logits, look.weights, look.choice, look.overlap]
    for tensor in inputs:
        tensor.requires_grad_()
    loss, terms = compute(whole, logits, look, persons=persons, annotations=annotations)
    expected = torch.autograd.grad(loss, inputs)
    whole.end_step()
    total = 0.0
    shares = (Share(5 / 6, 2 / 3, 1 / 2), Share(1 / 6, 1 / 3, 1 / 2))
    for image, (row, captions, share) in enumerate(zip(rows, CAPTIONS.split(1), shares, strict=True)):
        seen = Attended._make(None if entry is None else entry[row] for entry in look)
        part, its_terms = compute(
            split,
            logits[row],
            seen,
            captions,
            TARGETS[row],
            share,
            persons=persons[[image]],
            annotations=annotations[[image]],
        )
        total = total + part
        parts.append(its_terms)
    split.end_step()
    for found, gradient in zip(torch.autograd.grad(total, inputs), expected, strict=True):
        torch.testing.assert_close(found, gradient)
    assert {name: sum(part[name] for part in parts) for name in terms} == pytest.approx(terms, rel=1e-5)
    assert split.baseline.item() == pytest.approx(whole.baseline.item())
    assert whole.baseline != -2


def test_choices_follow_on_average_the_gradient_of_the_expected_likelihood():
    """The REINFORCE identity, whatever the baseline: one caption of one word, every choice of location tried."""
    scores = torch.tensor([0.3, -0.2, 0.5], dtype=torch.double, requires_grad=True)
    logits_after = torch.randn(3, 1, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    captions, targets = torch.tensor([[[1]]]), torch.tensor([4])
    weights = scores.softmax(0)
    expected_loss = 0.0
    for location, logits in enumerate(logits_after):
        loss_of = CaptionLoss(LossSettings(0.0, doubly_stochastic=0.0, reinforce=1.0)).double()
        loss_of.baseline.fill_(-3.0)
        loss_of.begun.fill_(True)
        look = Attended(weights[None], choice=weights[location].log()[None])
        loss, _ = compute(loss_of, logits, look, captions, targets)
        expected_loss = expected_loss + weights[location].detach() * loss
    (found,) = torch.autograd.grad(expected_loss, scores, retain_graph=True)
    likelihoods = logits_after.log_softmax(dim=-1)[:, 0, 4]
    (expected,) = torch.autograd.grad(-(weights * likelihoods).sum(), scores)
    torch.testing.assert_close(found, expected)


def test_the_moving_average_is_saved_with_a_run():
    loss_of = CaptionLoss(LossSettings())
    compute(loss_of, *make(choice=torch.zeros(6)))
    loss_of.end_step()
    again = CaptionLoss(LossSettings())
    again.load_state_dict(loss_of.state_dict())
    assert again.baseline == loss_of.baseline != 0
    assert again.begun
