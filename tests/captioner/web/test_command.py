import json
import signal
import socket
import sys

import pytest

from captioner.installation import install_hint
from captioner.web import command

pytest.importorskip("fastapi", reason="needs the extra web")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_the_command_serves_until_a_signal_stops_it_with_success(serve_process, tiny_checkpoint, pictures, number):
    limits = ("--max-bytes", "50000", "--ban", "dog", "--beam-size", "4", "--allow-host", "Captions.example")
    client = serve_process("--model", tiny_checkpoint, *limits)
    assert client.health()["model"] == "tiny"
    assert json.loads(client.ask("GET", "/api/limits").content) == {"bytes": 50_000, "candidates": 4}
    reply = json.loads(client.caption(pictures[0].read_bytes(), "?candidates=4").content)
    assert "dog" not in {word for record in (reply, *reply["candidates"]) for word in record["words"]}
    for host, status in {"captions.example": 200, "localhost:1": 200, "evil.example": 400}.items():
        assert client.ask("GET", "/health", Host=host).status == status
    assert client.stop(number) == (0, "")


def test_the_server_runs_without_pytorch(serve_process, tiny_checkpoint, pictures):
    client = serve_process("--model", tiny_checkpoint, without=("torch", "torchvision"))
    assert client.caption(pictures[0].read_bytes()).status == 200


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--port", "65536"], "--port: must be 0 to 65535"),
        (["--queue", "0"], "--queue: must be 1 to 1048576"),
        (["--max-bytes", "-1"], "--max-bytes: must be 1 to "),
    ],
)
def test_invalid_options_are_refused(capsys, options, problem):
    with pytest.raises(SystemExit, match="2"):
        command.main(options)
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--model", "none.safetensors"], "no such checkpoint"),
        (["--beam-size", "0"], "--beam-size: must be at least 1"),
        (["--ban", "two words"], "ban: expected one word"),
        (["--device", "toaster"], "device 'toaster' cannot be used"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    ],
)
def test_errors_at_the_start_are_reported_in_one_line(capsys, monkeypatch, tiny_checkpoint, options, problem):
    monkeypatch.setenv("CAPTIONER_MODEL", str(tiny_checkpoint))
    assert command.main(["--port", "0", *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith("caption-web: error: ")
    assert problem in message
    assert message.count("\n") == 1


def test_a_port_in_use_is_reported(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command.main(["--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_a_missing_extra_is_named(capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    for module in [name for name in sys.modules if name.startswith("captioner.web.")]:
        monkeypatch.delitem(sys.modules, module)
    from captioner.web.command import main

    assert main([]) == 2
    assert f"which is not installed. Run: {install_hint('web')}\n" in capsys.readouterr().err
