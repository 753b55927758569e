"""GET /docs: the OpenAPI document as a page that needs nothing from elsewhere."""

from __future__ import annotations

import html
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
        color-scheme: light dark; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
td, th {{ text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #8884; }}
summary {{ cursor: pointer; font-weight: 600; padding: .3rem 0; }}
code {{ font-size: 14px; }}
</style>
<h1>{title}</h1><p>{about} The document itself: <a href="openapi.json">openapi.json</a>.</p>
{operations}</html>
"""


@router.get("/docs")
async def documents(request: Request) -> HTMLResponse:
    """Every address with its fields."""
    document = request.app.openapi()
    operations = [
        _operation(document, path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    info = document["info"]
    title = f"{info['title']} {info['version']}"
    return HTMLResponse(
        PAGE.format(title=html.escape(title), about=html.escape(info["description"]), operations="\n".join(operations))
    )


def _operation(document: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [f"<p>{html.escape(operation.get('description', ''))}</p>"]
    body = operation.get("requestBody")
    if body is not None:
        parts.append(_fields(document, body["content"]["application/json"]["schema"]))
    answer = operation["responses"].get("200", {}).get("content", {}).get("application/json")
    if answer is not None:
        parts.append(f"<details><summary>answer</summary>{_fields(document, answer['schema'])}</details>")
    return f"<details><summary><code>{method.upper()} {html.escape(path)}</code></summary>{''.join(parts)}</details>"


def _fields(document: dict[str, Any], schema: dict[str, Any]) -> str:
    schema = _resolved(document, schema)
    required = schema.get("required", [])
    rows = [
        f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(_kind(field))}</td>"
        f"<td>{html.escape(_default(field, needed=name in required))}</td>"
        f"<td>{html.escape(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    ]
    head = "<tr><th>field</th><th>values</th><th>default</th><th>what it is</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        found: dict[str, Any] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return found
    return schema


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]:,}" for name, sign in signs.items() if name in schema]
    return ", ".join([str(schema.get("type", "anything")), *bounds])


def _default(schema: dict[str, Any], *, needed: bool) -> str:
    if needed:
        return "has to be given"
    value = schema.get("default")
    return "" if value is None else str(value)
