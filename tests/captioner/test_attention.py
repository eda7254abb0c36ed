import pytest
import torch

from captioner import attention
from captioner.attention import AdditiveAttention, AttentionSettings

B, K, L, D, H, A = 3, 2, 5, 7, 6, 4


@pytest.fixture
def mechanism():
    torch.manual_seed(0)
    return AdditiveAttention(AttentionSettings(size=A), D, H).double()


def make_inputs():
    torch.manual_seed(1)
    return torch.randn(B, L, D, dtype=torch.double), torch.randn(B * K, H, dtype=torch.double)


def test_additive_attention_equals_a_plain_loop_over_its_formula(mechanism):
    annotations, hidden = make_inputs()
    context, weights = mechanism(hidden, mechanism.prepare(annotations), annotations)
    image_weight, state_weight = mechanism.from_image.weight, mechanism.from_state.weight
    for row in range(B * K):
        image = row // K
        scores = []
        for location in range(L):
            inner = (
                image_weight @ annotations[image, location] + mechanism.from_image.bias + state_weight @ hidden[row]
            )
            scores.append((mechanism.score.weight[0] * inner.tanh()).sum().exp())
        expected = torch.stack(scores) / sum(scores)
        torch.testing.assert_close(weights[row], expected)
        torch.testing.assert_close(
            context[row], sum(alpha * a for alpha, a in zip(expected, annotations[image], strict=True))
        )


def test_weights_sum_to_one(mechanism):
    annotations, hidden = make_inputs()
    _, weights = mechanism(hidden, mechanism.prepare(annotations), annotations)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(B * K, dtype=torch.double))


@pytest.mark.parametrize("cached", [1, L * K * A * 2, 1 << 18], ids=["one image", "two images", "all images"])
def test_gradients_agree_with_finite_differences(mechanism, monkeypatch, cached):
    monkeypatch.setattr(attention, "_CACHED", cached)
    annotations, hidden = make_inputs()
    inputs = (hidden, mechanism.prepare(annotations), annotations)
    inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    torch.autograd.gradcheck(lambda *all: mechanism(*all[:3]), (*inputs, *mechanism.parameters()))


def test_a_batch_equals_its_images_one_by_one(mechanism):
    annotations, hidden = make_inputs()
    context, weights = mechanism(hidden, mechanism.prepare(annotations), annotations)
    for image in range(B):
        rows, one = slice(image * K, (image + 1) * K), annotations[image : image + 1]
        alone_context, alone_weights = mechanism(hidden[rows], mechanism.prepare(one), one)
        torch.testing.assert_close(context[rows], alone_context)
        torch.testing.assert_close(weights[rows], alone_weights)
