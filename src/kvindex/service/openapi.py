"""The OpenAPI document, from the structs that requests are decoded as."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from .. import __version__

__all__ = ["document"]

_ERROR = {
    "type": "object",
    "required": ["error", "reason"],
    "properties": {
        "error": {"type": "string", "description": "What is wrong, and what would be right."},
        "reason": {"type": "string", "description": "The same for programs: missing, invalid_type, too_large, ..."},
        "field": {"type": "string", "description": "The field of the request."},
        "index": {"type": "integer", "description": "The position in a list."},
    },
}


def document(routes: Iterable[Any], secured: bool) -> dict[str, Any]:
    """Build ``/openapi.json`` for ``routes`` (:class:`~kvindex.service.app.Call`)."""
    listed = list(routes)
    structs = [each for route in listed for each in (route.body, route.query) if each is not None]
    _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for route in listed:
        about: dict[str, Any] = {
            "operationId": f"{route.method.lower()}{route.path.replace('/', '_')}",
            "summary": route.about,
            "tags": [route.tag],
            "responses": {
                str(status): {"description": said, **_content(route)} for status, said in route.answers.items()
            }
            | {str(status): {"$ref": "#/components/responses/Error"} for status in route.errors},
        }
        if route.body is not None:
            content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{route.body.__name__}"}}}
            if route.binary:
                content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
                about["description"] = (
                    "A body of application/octet-stream is the prompt's token ids as little-endian 32-bit integers; "
                    "the other fields are then in the query string."
                )
            about["requestBody"] = {"required": True, "content": content}
        if route.query is not None:
            about["parameters"] = [
                {"name": name, "in": "query", "required": False, "schema": _plain(schema)}
                for name, schema in schemas[route.query.__name__]["properties"].items()
            ]
        if route.free:
            about["security"] = []
        paths.setdefault(route.path, {})[route.method.lower()] = about
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "kvindex",
            "version": __version__,
            "description": "Which LLM server holds which prompt prefix in its KV cache.",
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Error": _ERROR},
            "responses": {
                "Error": {
                    "description": "The request is refused.",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
            },
        },
    }
    if secured:
        made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"token": []}]
    return made


def _content(route: Any) -> dict[str, Any]:
    return {"content": {route.media_type: {"schema": {}}}}


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a query parameter, without null: a query string leaves absent parameters out."""
    options = [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]
    return {name: value for name, value in options[0].items() if name != "default"}
