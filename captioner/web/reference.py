"""What the HTTP interface offers, as a page without scripts, from the application's own description of itself."""

from typing import Any


def reference_page(schema: dict[str, Any]) -> str:
    return "<!DOCTYPE html><title>captioner</title>"
