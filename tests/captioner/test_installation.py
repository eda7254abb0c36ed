import json
from importlib.metadata import PackageNotFoundError

import pytest

from captioner import installation
from captioner.installation import install_hint


class Installed:
    """A distribution whose `direct_url.json` (PEP 610) has this content."""

    def __init__(self, content):
        self.content = content

    def read_text(self, name):
        assert name == "direct_url.json"
        return self.content


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Pretend that the package lies in a folder of packages, and came from somewhere."""
    monkeypatch.setattr(installation, "__file__", str(tmp_path / "captioner" / "installation.py"))

    def install(origin):
        content = json.dumps(origin) if isinstance(origin, dict) else origin
        monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed(content))

    return install


@pytest.mark.parametrize(
    ("origin", "target"),
    [
        (None, "captioner[web]"),
        ("no JSON", "captioner[web]"),
        ({"url": "file:///my%20work/captioner", "dir_info": {}}, "/my work/captioner[web]"),
        ({"url": "file:///c-1.0-py3-none-any.whl", "archive_info": {}}, "/c-1.0-py3-none-any.whl[web]"),
        (
            {"url": "https://example.org/c.git", "vcs_info": {"vcs": "git", "commit_id": "1f2e"}},
            "captioner[web] @ git+https://example.org/c.git",
        ),
        (
            {
                "url": "https://example.org/c.git",
                "vcs_info": {"vcs": "git", "commit_id": "1f", "requested_revision": "v2"},
            },
            "captioner[web] @ git+https://example.org/c.git@v2",
        ),
        (
            {"url": "https://example.org/c-1.0.whl", "archive_info": {}},
            "captioner[web] @ https://example.org/c-1.0.whl",
        ),
    ],
)
def test_the_command_installs_from_the_original_source(install, origin, target):
    install(origin)
    assert install_hint("web") == f'pip install "{target}"'
    assert install_hint(upgrade=True) == f'pip install --upgrade "{target.replace("[web]", "")}"'


def test_an_uninstalled_package_is_named(install, monkeypatch):
    def fail(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", fail)
    assert install_hint() == 'pip install "captioner"'


def test_a_checkout_is_installed_as_one(monkeypatch, tmp_path):
    monkeypatch.setattr(installation, "__file__", str(tmp_path / "captioner" / "installation.py"))
    (tmp_path / "pyproject.toml").touch()
    assert install_hint("train") == f'pip install -e "{tmp_path}[train]"'
