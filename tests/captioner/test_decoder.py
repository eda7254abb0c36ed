import pytest
import torch

from captioner.attention import AttentionSettings
from captioner.decoder import DecoderSettings, build_decoder
from captioner.vocabulary import PAD, START

VOCABULARY_SIZE = 11


def make_decoder(tied_output: bool = False):
    torch.manual_seed(0)
    settings = DecoderSettings(hidden_size=6, embedding_size=5, tied_output=tied_output)
    return build_decoder(settings, AttentionSettings(size=4), annotation_size=7, vocabulary_size=VOCABULARY_SIZE)


def make_captions() -> torch.Tensor:
    """Three captions of two images; the third column of the first image is not there."""
    return torch.tensor(
        [
            [[START, 4, 5, 6, 7], [START, 8, 9, PAD, PAD], [PAD, PAD, PAD, PAD, PAD]],
            [[START, 10, 4, PAD, PAD], [START, 5, PAD, PAD, PAD], [START, PAD, PAD, PAD, PAD]],
        ]
    )


@pytest.mark.parametrize("tied_output", [False, True])
def test_reading_whole_captions_equals_writing_them_step_by_step(tied_output):
    decoder = make_decoder(tied_output).eval()
    annotations = torch.randn(2, 9, 7)
    captions = make_captions()
    logits, attention = decoder(annotations, captions)
    log_probs = logits.log_softmax(dim=-1)

    place = 0
    for image in range(2):
        for caption in captions[image]:
            state = decoder.start(annotations[image : image + 1])
            for word in caption[caption != PAD]:
                expected, state, weights = decoder.step(word[None], state)
                torch.testing.assert_close(log_probs[place], expected[0])
                torch.testing.assert_close(attention[place], weights[0])
                place += 1
    assert place == len(logits) == int((captions != PAD).sum())


def test_a_step_equals_the_papers_equations_computed_by_hand():
    decoder = make_decoder().eval()
    annotations = torch.randn(1, 9, 7)
    a = annotations[0]
    a = (a - a.mean(1, keepdim=True)) / (a.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    weights = dict(decoder.named_parameters())

    def linear(name, x):
        bias = weights.get(f"{name}.bias")
        return weights[f"{name}.weight"] @ x + (0 if bias is None else bias)

    h = torch.tanh(linear("start_hidden", a.mean(0)))
    c = torch.tanh(linear("start_memory", a.mean(0)))
    query = linear("attention.from_state", h)
    scores = torch.stack(
        [linear("attention.score", torch.tanh(linear("attention.from_image", a_i) + query)) for a_i in a]
    ).squeeze(1)
    alpha = scores.exp() / scores.exp().sum()  # equation 5
    beta = torch.sigmoid(linear("gate", h))
    z = beta * sum(alpha_i * a_i for alpha_i, a_i in zip(alpha, a, strict=True))
    ey = decoder.embedding.weight[START]
    i, f, o, g = (
        linear("gates_from_word", ey) + linear("gates_from_hidden", h) + linear("gates_from_context", z)
    ).split(6)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # equation 2
    h = torch.sigmoid(o) * torch.tanh(c)  # equation 3
    combined = ey + linear("output_from_hidden", h) + linear("output_from_context", z)
    logits = decoder.output_weight @ combined + decoder.output_bias  # equation 7

    log_probs, state, attention = decoder.step(torch.tensor([START]), decoder.start(annotations))
    torch.testing.assert_close(log_probs[0], logits - logits.exp().sum().log())
    torch.testing.assert_close(state.hidden[0], h)
    torch.testing.assert_close(state.memory[0], c)
    torch.testing.assert_close(attention[0], alpha)


def test_gradients_agree_with_finite_differences():
    decoder = make_decoder().double().eval()
    annotations = torch.randn(2, 3, 7, dtype=torch.double, requires_grad=True)
    captions = make_captions()[:, :, :3]
    torch.autograd.gradcheck(lambda a, *_: decoder(a, captions)[0], (annotations, *decoder.parameters()))


def test_a_state_can_be_selected_row_by_row():
    decoder = make_decoder().eval()
    annotations = torch.randn(3, 4, 7)
    state = decoder.start(annotations)
    chosen = state.select(torch.tensor([[2, 2], [0, 0]]))
    words = torch.tensor([4, 5, 6, 7])
    log_probs, after, attention = decoder.step(words, chosen)
    for row, image in enumerate([2, 2, 0, 0]):
        alone = decoder.start(annotations[image : image + 1])
        expected, _, weights = decoder.step(words[row : row + 1], alone)
        torch.testing.assert_close(log_probs[row], expected[0])
        torch.testing.assert_close(attention[row], weights[0])
    branched = after.select(torch.tensor([[3, 2]]))
    torch.testing.assert_close(branched.hidden, after.hidden[[3, 2]])
    torch.testing.assert_close(branched.annotations, state.annotations[:1])
