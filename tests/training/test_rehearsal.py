"""All commands of docs/training.md for COCO, on a COCO of 36 pictures that is served on the loopback.

The encoder is a ResNet-18 instead of a ResNet-101, which takes minutes to export.
"""

import json
import re
import shlex
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from captioner.model_file import read_header
from evaluation.__main__ import main as evaluate
from evaluation.datasets import read_dataset
from training.__main__ import main as train

ROOT = Path(__file__).parents[2]


def coco_commands():
    (block,) = re.findall(r"<!-- coco -->\n```sh\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def write_archives(data, folder):
    """Write COCO's archives and Karpathy's, with 20 pictures to learn, 8 development and 8 test pictures."""
    records = [
        picture
        for picture in read_dataset("jsonl", data / "general" / "captions.jsonl")
        if "coco" in picture.image_id
    ]
    train = [picture for picture in records if picture.split == "train" and len(picture.captions) == 5][:20]
    chosen = [("train", picture) for picture in train[:16]] + [("restval", picture) for picture in train[16:]]
    held = [picture for picture in records if picture.split == "dev"][:16]
    chosen += [("val", picture) for picture in held[:8]] + [("test", picture) for picture in held[8:]]
    rows, pictures, annotations = [], {"train": [], "val": []}, {"train": [], "val": []}
    for split, record in chosen:
        number = int(re.search(r"\d+", record.image.stem)[0])
        part = "train" if split == "train" else "val"
        name = f"COCO_{part}2014_{number:012}.jpg"
        pictures[part].append((name, record.image))
        rows.append(
            {
                "filepath": f"{part}2014",
                "filename": name,
                "cocoid": number,
                "imgid": len(rows),
                "split": split,
                "sentences": [{"raw": text, "tokens": text.lower().split()} for text in record.captions],
            }
        )
        annotations[part] += [{"image_id": number, "id": 0, "caption": text} for text in record.captions]
    for part, files in pictures.items():
        with zipfile.ZipFile(folder / f"{part}2014.zip", "w") as archive:
            for name, file in files:
                archive.write(file, f"{part}2014/{name}")
    with zipfile.ZipFile(folder / "annotations_trainval2014.zip", "w") as archive:
        for part, notes in annotations.items():
            archive.writestr(f"annotations/captions_{part}2014.json", json.dumps({"annotations": notes}))
    with zipfile.ZipFile(folder / "caption_datasets.zip", "w") as archive:
        archive.writestr("dataset_coco.json", json.dumps({"dataset": "coco", "images": rows}))


@pytest.fixture
def server(real_data, tmp_path):
    """The address of the archives."""
    folder = tmp_path / "served"
    folder.mkdir()
    write_archives(real_data, folder)
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    handler.func.log_message = lambda *values: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A ResNet-18 where torchvision looks for the one that it would download. Its weights are random."""
    from torchvision.models import ResNet18_Weights, resnet18

    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    file = ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    # As training begins with it: otherwise, what it gives does not fit into float16.
    torch.save(resnet18(zero_init_residual=True).state_dict(), folder / file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.slow
def test_the_commands_for_coco_run_to_test_scores(server, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = (ROOT / "configs" / "coco.toml").read_text()
    assert 'name = "resnet101"' in config
    Path("configs").mkdir()
    Path("configs/coco.toml").write_text(config.replace('name = "resnet101"', 'name = "resnet18"'))
    commands = coco_commands()
    assert [command[2:4] for command in commands[:3]] == [
        ["training", "download"],
        ["training", "check"],
        ["training", "prepare"],
    ]
    for _, _, module, *arguments in commands:
        if arguments[0] == "download":
            arguments += ["--from", server]
        if (module, arguments[0]) == ("training", "run"):
            arguments += ["--set", "optimizer.epochs=1"]
        assert {"training": train, "evaluation": evaluate}[module](arguments) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert 'layout = "karpathy"' in out
    assert "coco: train 20 pictures, 100 captions; dev 8 pictures" in out
    assert "8 images" in out
    assert re.search(r"CIDEr-D +\d", out)
    runs = {name: tmp_path / "runs" / name for name in ("coco", "coco-tuned", "coco-critical")}
    cards = {name: read_header(folder / "best.safetensors").card for name, folder in runs.items()}
    assert {name: card["training"]["start_from"] for name, card in cards.items()} == {
        "coco": "none",
        "coco-tuned": "runs/coco/best.safetensors",
        "coco-critical": "runs/coco-tuned/best.safetensors",
    }
    log = [json.loads(line) for line in (runs["coco-critical"] / "log.jsonl").read_text().splitlines()]
    assert log[0]["epoch"] == 0
    assert log[0]["scores"] == cards["coco-tuned"]["development_scores"]


def test_the_header_of_the_configuration_has_the_documented_commands():
    text = (ROOT / "configs" / "coco.toml").read_text()
    lines = "".join(line.removeprefix("# ") + "\n" for line in text.split("\n#\n")[0].splitlines())
    assert [shlex.split(line) for line in lines.replace("\\\n", " ").splitlines()] == coco_commands()
