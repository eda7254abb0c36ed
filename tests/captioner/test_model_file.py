import math
import os
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from captioner import CheckpointError, SearchSettings
from captioner.captioning import load
from captioner.images import ImageSettings
from captioner.model_file import (
    FORMAT,
    Header,
    open_file,
    read_header,
    read_shapes,
    read_weights,
    weight_shapes,
)
from captioner.network.checkpoint import load_checkpoint, save_checkpoint
from captioner.network.export import export_graphs
from captioner.network.fold import fold_batch_norms
from captioner.network.model import build_network
from captioner.settings import DecoderSettings, EncoderSettings, ModelSettings
from captioner.vocabulary import PIECES_RULE, RULE, SPECIAL


@pytest.fixture
def rewrite(rewrite_model, tiny_checkpoint):
    return partial(rewrite_model, tiny_checkpoint)


def test_round_trip_is_exact(tiny_checkpoint, tmp_path):
    network, header = load_checkpoint(tiny_checkpoint)
    again = tmp_path / "again.safetensors"
    save_checkpoint(again, network, header, graphs=export_graphs(header.model, len(header.words), 64))
    assert again.read_bytes() == tiny_checkpoint.read_bytes()
    other, other_header = load_checkpoint(again)
    assert other_header == header
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_loaded_weights_are_aligned(tiny_checkpoint):
    # Products with a matrix that begins at another address may round otherwise.
    network, _ = load_checkpoint(tiny_checkpoint)
    assert {tensor.data_ptr() % 64 for tensor in network.state_dict().values()} == {0}


@pytest.fixture(scope="module")
def checkpoint_of_pieces(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint with pieces of words for words."""
    network, header = load_checkpoint(tiny_checkpoint)
    pieces = ("a", "b", "a</w>", "b</w>", "ab", "ab</w>", "ba", "ba</w>", "aba</w>", "bab", "baab</w>", "bb")
    merges = (("a", "b"), ("a", "b</w>"), ("b", "a"), ("b", "a</w>"), ("ab", "a</w>"), ("ba", "b"))
    merges += (("ba", "ab</w>"), ("b", "b"))
    header = replace(header, words=(*SPECIAL, *pieces), merges=merges, tokenizer=PIECES_RULE)
    path = tmp_path_factory.mktemp("checkpoints") / "pieces.safetensors"
    graphs = export_graphs(header.model, len(header.words), header.images.size)
    save_checkpoint(path, network, header, graphs=graphs)
    return path


def test_a_vocabulary_of_pieces_round_trips(checkpoint_of_pieces, tiny_checkpoint):
    header = read_header(checkpoint_of_pieces)
    assert header.tokenizer == PIECES_RULE
    assert header.merges[4] == ("ab", "a</w>")
    assert load(checkpoint_of_pieces).vocabulary.merges == header.merges
    assert read_header(tiny_checkpoint).merges == ()


def test_an_old_header_without_pieces_is_read(rewrite, tiny_checkpoint):
    path = rewrite(lambda values: values.pop("merges"))
    assert read_header(path) == read_header(tiny_checkpoint)


def test_captions_in_pieces_have_whole_words(checkpoint_of_pieces, tiny, pictures):
    """The same network, so its pieces are the words of the other: a word's map is their mean."""
    spelling = load(checkpoint_of_pieces, device="cpu")
    settings = SearchSettings(beam_size=3, max_words=7, repeat_size=0)  # pieces within a word may repeat
    merged = 0
    for picture in pictures:
        whole, spelt = tiny.caption(picture, settings), spelling.caption(picture, settings)
        numbers = [tiny.vocabulary.words.index(word) for word in whole.words]
        spans = spelling.vocabulary.spans(numbers)
        assert spelt.words == spelling.vocabulary.decode(numbers)
        assert spelt.text == " ".join(spelt.words)
        assert "<" not in spelt.text
        assert spelt.attention.shape == (len(spans), *whole.attention.shape[1:])
        np.testing.assert_allclose(spelt.attention.sum((1, 2)), 1, rtol=1e-5)
        for span, weights, log_prob in zip(spans, spelt.attention, spelt.log_probs, strict=True):
            np.testing.assert_allclose(weights, whole.attention[span].mean(0), atol=1e-6)
            assert log_prob == pytest.approx(sum(whole.log_probs[span]))
            merged += span.stop - span.start > 1
        assert spelt.log_prob == pytest.approx(whole.log_prob)
    assert merged > 0  # or this would say little


def test_half_precision_storage_is_read_as_float32(tiny_checkpoint, tmp_path):
    network, header = load_checkpoint(tiny_checkpoint)
    path = tmp_path / "half.safetensors"
    save_checkpoint(path, network, header, torch.float16)
    assert path.stat().st_size < 0.6 * tiny_checkpoint.stat().st_size
    half, _ = load_checkpoint(path)
    for name, tensor in network.decoder.named_parameters():
        assert half.decoder.state_dict()[name].dtype == torch.float32
        torch.testing.assert_close(half.decoder.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)


def test_shapes_are_those_of_the_network(tiny_checkpoint):
    network, _ = load_checkpoint(tiny_checkpoint)
    assert read_shapes(tiny_checkpoint) == {
        name: tuple(tensor.shape) for name, tensor in network.state_dict().items()
    }


def test_a_loaded_network_is_frozen_and_in_eval_mode(tiny_checkpoint):
    network, _ = load_checkpoint(tiny_checkpoint)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    path, trace = tmp_path / "model.safetensors", tmp_path / "ran"
    for write in (lambda: path.write_bytes(pickle.dumps(Bomb(trace))), lambda: torch.save(Bomb(trace), path)):
        write()
        for engine in ("onnx", "torch"):
            with pytest.raises(CheckpointError, match="never read"):
                load(path, device="cpu", engine=engine)
        assert not trace.exists()


def test_a_newer_format_is_refused_with_advice(rewrite):
    path = rewrite(lambda values: values.update(format=FORMAT + 1))
    with pytest.raises(CheckpointError, match="Upgrade: pip install --upgrade"):
        read_header(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("format"), "header cannot be read"),
        (lambda values: values.update(words=["dog"]), "words: a vocabulary must start with"),
        (lambda values: values.update(tokenizer="none"), "tokenizer: expected 'words-1'"),
        (
            lambda values: values.update(tokenizer="pieces-1"),
            "tokenizer: expected 'words-1' with 0 merges, got 'pieces-1'",
        ),
        (lambda values: values.update(merges=[["a", "s"]]), "words: a vocabulary must contain 'a', 's'"),
        (
            lambda values: values.update(merges=[["i", "n"]], words=[*values["words"], "i", "n"]),
            "tokenizer: expected 'pieces-1' with 1 merges, got 'words-1'",
        ),
        (lambda values: values.update(merges=[["a"]]), r"merges\[0\]: expected a list of 2"),
        (lambda values: values["model"]["encoder"].update(name="alexnet"), "unknown encoder"),
        (lambda values: values["model"].update(extra=1), "extra: unknown setting"),
    ],
)
def test_an_invalid_header_is_refused(rewrite, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(rewrite(change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("decoder.gate.weight"), "decoder.gate.weight is missing"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "more is unknown"),
        (
            lambda tensors: tensors.update({"decoder.gate.bias": torch.zeros(2)}),
            r"must be float \(1,\), got float \(2,\)",
        ),
        (
            lambda tensors: tensors.update({"decoder.gate.bias": torch.zeros(1, dtype=torch.int64)}),
            r"must be float \(1,\), got integer \(1,\)",
        ),
    ],
)
def test_weights_that_do_not_match_the_header_are_refused(rewrite, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(rewrite(tensors=change))


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_weights_alone_are_not_a_captioner(tmp_path, engine):
    path = tmp_path / "weights.safetensors"
    save_file({"layer": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not a captioner"):
        load(path, device="cpu", engine=engine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_folded_weights_equal_those_of_pytorch(tmp_path, dtype):
    """Batch norms are folded twice: by NumPy from the file, and in the network of PyTorch."""
    settings = ModelSettings(EncoderSettings("resnet18", 16), decoder=DecoderSettings(hidden_size=16))
    network = build_network(settings, len(SPECIAL) + 1, 64)
    for name, tensor in network.encoder.state_dict().items():
        if name.endswith(("running_mean", "running_var", "weight", "bias")):
            torch.nn.init.uniform_(tensor, 0.1, 1)
    path = tmp_path / "model.safetensors"
    words = (*SPECIAL, "a")
    save_checkpoint(path, network, Header(FORMAT, settings, ImageSettings(size=64), words, RULE), dtype)
    network, _ = load_checkpoint(path)
    folds = fold_batch_norms(network.encoder)
    expected = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    with open_file(path) as file:
        shapes = weight_shapes(file, folds)
        weights = read_weights(file, expected, folds)
    assert len(folds) == 15
    for name, tensor in expected.items():
        assert shapes[name] == tuple(tensor.shape)
        np.testing.assert_allclose(weights[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)


def test_an_interrupted_save_leaves_the_old_file(tiny_checkpoint, tmp_path, monkeypatch):
    network, header = load_checkpoint(tiny_checkpoint)
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, network, header)
    before = path.read_bytes()
    monkeypatch.setattr("captioner.network.checkpoint.save", lambda *_, **__: pytest.fail("disk full"))
    with pytest.raises(BaseException, match="disk full"):
        save_checkpoint(path, network, header)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("engine", ["onnx", "torch"])
@pytest.mark.parametrize("settings", [SearchSettings(), SearchSettings(sample=True)], ids=["beam", "sampling"])
def test_nan_weights_are_an_error_with_the_name_of_the_file(rewrite, pictures, engine, settings):
    path = rewrite(tensors=lambda tensors: tensors["decoder.output_weight"].fill_(math.nan))
    with pytest.raises(CheckpointError, match=r"not numbers \(NaN\)") as caught:
        load(path, engine=engine).caption(pictures[0], settings)
    assert str(caught.value).startswith(f"{path}: ")


def test_the_command_reports_nan_weights_in_one_line(rewrite, run, pictures):
    path = rewrite(tensors=lambda tensors: tensors["decoder.output_weight"].fill_(math.nan))
    code, output, messages = run(*pictures, "-m", path)
    assert (code, output) == (2, "")
    assert messages.startswith(f"caption: error: {path}: the model's predictions are not numbers (NaN)")
    assert messages.count("\n") == 1
