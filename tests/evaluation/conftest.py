import pytest


@pytest.fixture
def without_java(monkeypatch):
    """Its programs take seconds to start; test_meteor.py and test_spice.py have them."""
    monkeypatch.setattr("evaluation.metrics.java.importlib.util.find_spec", lambda name: None)
