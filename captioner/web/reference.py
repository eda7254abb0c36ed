"""The reference of the HTTP API: its OpenAPI schema as an HTML page without scripts.

The usual viewers of OpenAPI load megabytes of script from another server.
"""

import html
import re
from collections.abc import Iterable
from typing import Any

REFERENCE = "#/components/schemas/"


def reference_page(description: dict[str, Any]) -> str:
    """Return the HTML page of an OpenAPI schema, as `FastAPI.openapi()` returns it."""
    title = html.escape(f"{description['info']['title']} {description['info']['version']}")
    operations = (
        _operation(path, method, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    )
    schemas = description["components"]["schemas"]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: reference</title>
<link rel="icon" href="static/icon.svg">
<link rel="stylesheet" href="static/reference.css">
</head>
<body>
<main>
<h1>{title}</h1>
<p>{html.escape(description["info"]["description"])}
Also as <a href="openapi.json">OpenAPI</a>; the <a href=".">web page</a>.</p>
{"".join(operations)}
<h2>Objects</h2>
{"".join(_object(name, schema) for name, schema in schemas.items())}
</main>
</body>
</html>
"""


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    parameters = [
        (parameter["name"], f"{_type(parameter['schema'])}{_range(parameter['schema'])}. {_prose(parameter)}")
        for parameter in operation.get("parameters", ())
    ]
    body = operation.get("requestBody", {}).get("content", {})
    responses = operation["responses"]
    return (
        f"<section><h2><code>{method.upper()} {html.escape(path)}</code></h2>"
        f"<p>{html.escape(operation['summary'])}. {_prose(operation)}</p>"
        + _table("Parameters", parameters)
        + _table("Body", ((kind, _body(content["schema"])) for kind, content in body.items()))
        + _table(
            "Responses",
            ((status, f"{_prose(response)} {_content(response)}") for status, response in responses.items()),
        )
        + "</section>"
    )


def _body(schema: dict[str, Any]) -> str:
    """Describe a body, or the fields of a form."""
    fields = schema.get("properties", {})
    described = (f"field <code>{html.escape(name)}</code>: {_prose(value)}" for name, value in fields.items())
    return "; ".join(described) or _prose(schema)


def _content(response: dict[str, Any]) -> str:
    return ", ".join(_type(content["schema"]) for content in response.get("content", {}).values())


def _object(name: str, schema: dict[str, Any]) -> str:
    rows = (
        (field if field in schema["required"] else f"{field}?", f"{_type(value)}. {_prose(value)}")
        for field, value in schema["properties"].items()
    )
    name = html.escape(name)
    return f'<section id="{name}"><h3>{name}</h3><p>{_prose(schema)}</p>{_table("", rows)}</section>'


def _table(heading: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return an HTML table of names (plain text) and descriptions (HTML); empty without rows."""
    cells = "".join(
        f'<tr><th scope="row"><code>{html.escape(name)}</code></th><td>{description}</td></tr>'
        for name, description in rows
    )
    caption = f"<caption>{heading}</caption>" if heading else ""
    return f"<table>{caption}{cells}</table>" if cells else ""


def _type(schema: dict[str, Any]) -> str:
    """Return a type as HTML: `integer`, `(number | null)[]`, `{word: number}[]`; references are links."""
    if "$ref" in schema:
        name = html.escape(schema["$ref"].removeprefix(REFERENCE))
        return f'<a href="#{name}"><code>{name}</code></a>'
    if "anyOf" in schema:
        return "<code> | </code>".join(map(_type, schema["anyOf"]))
    if "prefixItems" in schema:
        return f"<code>[</code>{'<code>, </code>'.join(map(_type, schema['prefixItems']))}<code>]</code>"
    if "items" in schema:
        is_union = "anyOf" in schema["items"]
        item = _type(schema["items"])
        return f"<code>(</code>{item}<code>)[]</code>" if is_union else f"{item}<code>[]</code>"
    if "additionalProperties" in schema:
        return f"<code>{{word: </code>{_type(schema['additionalProperties'])}<code>}}</code>"
    return f"<code>{html.escape(schema.get('type', 'any'))}</code>"


def _range(schema: dict[str, Any]) -> str:
    return f", {schema['minimum']} to {schema['maximum']}; default {schema['default']}"


def _prose(described: dict[str, Any]) -> str:
    """Return a description as HTML, with code in backquotes."""
    return re.sub(r"`(.*?)`", r"<code>\1</code>", html.escape(described.get("description", "")))
