"""Models on the Hugging Face Hub: `captioner.hub` and `python -m training push`, against a stand-in of the Hub."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

import captioner
from captioner import hub
from captioner.cli import EXAMPLE
from captioner.errors import CaptionerError, CheckpointError, DataError
from captioner.model_file import SHIPPED, read_header
from evaluation.datasets import read_dataset
from training.__main__ import main
from training.config import DatasetSettings
from training.push import push
from training.start import start_run

hf = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: the extra `hub`")
constants = importlib.import_module("huggingface_hub.constants")
SERVER = importlib.util.spec_from_file_location("hub_server", Path(__file__).parent / "hub_server.py")
server = importlib.util.module_from_spec(SERVER)
SERVER.loader.exec_module(server)

# Of how huggingface_hub calls its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

MODEL = SHIPPED["default"]
ADDRESS = "hf://me/model"


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A hub without commits, and an empty cache."""
    remote = server.Hub()
    hub.download_model.cache_clear()
    with server.serve(remote) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", server.TOKEN)
        yield remote
    hub.download_model.cache_clear()


def download(address=ADDRESS, max_bytes=1 << 30):
    hub.download_model.cache_clear()
    return hub.download_model(address, max_bytes)


def test_a_model_is_pushed_with_its_card_and_loads_again_without_a_connection(remote, capsys, monkeypatch):
    overlay = Path(__file__).parents[2] / "docs/attention-maps.png"
    assert main(["push", str(MODEL), "me/model", "--overlay", str(overlay)]) == 0
    assert capsys.readouterr().out.strip() == f"{constants.ENDPOINT}/me/model"
    (files,) = remote.commits
    assert files["model.safetensors"] == MODEL.read_bytes()
    assert files["thumbnail.png"] == overlay.read_bytes()
    card = hf.ModelCard(files["README.md"].decode()).data
    expected = {"library_name": "captioner", "pipeline_tag": "image-to-text", "license": "apache-2.0"}
    assert expected.items() <= card.to_dict().items()
    scores = read_header(MODEL).card["development_scores"]
    assert {(result.dataset_name, result.metric_name): result.metric_value for result in card.eval_results} == {
        (name, metric): round(100 * values[metric], 1)
        for name, values in scores.items()
        for metric in ("BLEU-4", "ROUGE-L", "CIDEr-D")
    }

    text = captioner.load(ADDRESS).caption(EXAMPLE).text
    assert sum(asked.startswith("GET /me/model/resolve/") for asked in remote.asked) == 1
    remote.status = 503
    hub.download_model.cache_clear()
    assert captioner.load(ADDRESS).caption(EXAMPLE).text == text


def test_a_dry_run_writes_what_would_be_uploaded(tmp_path, capsys):
    assert main(["push", str(MODEL), "me/model", "--dry-run", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "model.safetensors"}
    assert "thumbnail" not in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_a_branch_that_moved_is_downloaded_again_and_a_commit_is_not(remote):
    remote.commits = [{hub.FILE: b"first"}]
    assert download().read_bytes() == b"first"
    remote.commits.append({hub.FILE: b"second"})
    assert download().read_bytes() == b"second"
    assert download(f"{ADDRESS}@{server.name_of(0)}").read_bytes() == b"first"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://me/other", "no such repository, or a private one"),
        ("hf://me/model@v9", "the repository has no revision 'v9'"),
        ("hf://me", "expected hf://user/repo"),
        ("hf://me/model/x", "expected hf://user/repo"),
        ("hf://me/mo..del", "the download failed"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_clear_line(address, message, remote):
    remote.commits = [{hub.FILE: b"first"}]
    with pytest.raises(CheckpointError, match=message) as raised:
        download(address)
    assert str(raised.value).startswith(address)
    assert "\n" not in str(raised.value)


def test_a_repository_without_a_model_file_says_which_file_is_missing(remote):
    remote.commits = [{"README.md": b""}]
    with pytest.raises(CheckpointError, match=r"the repository has no model\.safetensors"):
        download()


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_fails_is_one_clear_line(status, remote):
    remote.commits = [{hub.FILE: b"first"}]
    remote.status = status
    with pytest.raises(CheckpointError, match=r"Hub cannot be reached|download failed"):
        download()


def test_a_file_that_is_too_large_is_refused_before_it_is_downloaded(remote):
    remote.commits = [{hub.FILE: b"first"}]
    with pytest.raises(CheckpointError, match="has 5 bytes; the maximum is 4"):
        download(max_bytes=4)
    assert not any(asked.startswith("GET /me/model/resolve/") for asked in remote.asked)


def test_a_download_that_breaks_off_leaves_no_model_file(remote, tmp_path):
    remote.commits = [{hub.FILE: b"first" * 100}]
    remote.truncate = True
    with pytest.raises(CheckpointError, match="the download failed"):
        download()
    remote.truncate = False
    assert download().read_bytes() == b"first" * 100


def test_what_is_no_model_file_is_refused(remote):
    remote.commits = [{hub.FILE: b"first" * 100}]
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file"):
        captioner.load(ADDRESS)


def test_an_upload_without_permission_says_to_log_in(remote, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CaptionerError, match=r"the upload failed.*log in"):
        push(MODEL, "me/model", overlay=None, folder=None, private=False)


# Data sets


@pytest.fixture
def files(write_parquet, tmp_path, dataset):
    """Parquet files of a data set, and a shard."""
    records = read_dataset("jsonl", dataset)
    train = write_parquet(tmp_path / "train.parquet", records[:4], 2).read_bytes()
    dev = write_parquet(tmp_path / "dev.parquet", records[4:], 2).read_bytes()
    return {"README.md": b"# Data", "data/train-0.parquet": train, "data/validation-0.parquet": dev}


def test_a_data_set_is_downloaded_once_and_read_again_without_a_connection(remote, files, monkeypatch):
    remote.commits = [files]
    records = read_dataset("hub", Path("hf://datasets/me/data"))
    assert [record.split for record in records] == ["train"] * 4 + ["dev"] * 4
    assert records[0].image()
    downloads = [path for path in remote.asked if path.startswith("GET /datasets/")]
    assert sorted(path.rpartition("/")[2] for path in downloads) == ["train-0.parquet", "validation-0.parquet"]
    remote.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = read_dataset("hub", Path("hf://datasets/me/data"))
    assert [record.captions for record in again] == [record.captions for record in records]
    assert not remote.asked


def test_a_pattern_chooses_files_of_a_data_set(remote, files, write_shards, dataset, tmp_path):
    (shard,) = write_shards(tmp_path / "shards", read_dataset("jsonl", dataset), 8).iterdir()
    remote.commits = [files, {**files, "test/0.tar": shard.read_bytes()}]
    first = server.name_of(0)
    assert len(read_dataset("hub", Path(f"hf://datasets/me/data@{first}/data/train-*.parquet"))) == 4
    assert len(read_dataset("hub", Path("hf://datasets/me/data/data"))) == 8
    records = read_dataset("hub", Path("hf://datasets/me/data/test/*.tar"))
    assert [record.image_id for record in records][:2] == ["train-red", "train-blue"]
    with pytest.raises(DataError, match="no such file"):
        read_dataset("hub", Path(f"hf://datasets/me/data@{first}/test/*.tar"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://me/data", "expected hf://datasets/user/name"),
        ("data.parquet", "expected hf://datasets/user/name"),
        ("hf://datasets/me/data@v9", "hf://datasets/me/data: the repository has no revision 'v9'"),
        ("hf://datasets/me/other", "hf://datasets/me/other: no such repository, or a private one"),
    ],
)
def test_an_address_without_a_data_set_is_rejected(remote, files, address, message):
    remote.commits = [files]
    with pytest.raises(DataError, match=message):
        read_dataset("hub", Path(address))


def test_a_hub_that_fails_is_reported(remote, files):
    remote.commits, remote.status = [files], 500
    with pytest.raises(DataError, match="hf://datasets/me/data: "):
        read_dataset("hub", Path("hf://datasets/me/data"))


def test_a_run_reads_a_data_set_of_the_hub(remote, files, settings, tmp_path):
    remote.commits = [files]
    data = DatasetSettings("remote", "hub", "hf://datasets/me/data")
    start_run(replace(settings, datasets=(data,)), tmp_path / "runs").train()
    assert (
        read_header(tmp_path / "runs" / "small" / "best.safetensors").card["data"]["remote"]["train_pictures"] == 4
    )
