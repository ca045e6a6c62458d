"""Errors of the service as problem details (RFC 9457): the value given, what is expected, and the next step."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from recsys2stage.serving.store import StoreError

MEDIA_TYPE = "application/problem+json"
SHOWN = 80  # characters of a value in a message
MAX_ERRORS = 20  # of one answer


class Problem(ValueError):
    """A request that cannot be answered.

    Args:
        status: HTTP status.
        kind: short name of the problem, the last part of its type.
        detail: value given, expectation and next step.
        field: of the request's body or query, such as history.items.3; None: the request as a whole.
        value: the value given.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        field: str | None = None,
        value: Any = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.field, self.value, self.retry_after = field, value, retry_after

    def body(self, request_id: str) -> dict[str, Any]:
        """The problem as JSON."""
        errors = [] if self.field is None else [_error(self.field, self.value, self.detail)]
        return problem_body(self.status, self.kind, self.detail, request_id, errors)


def wrong(field: str, value: Any, detail: str) -> Problem:
    """A wrong value of a field."""
    return Problem(422, "wrong-value", f"{field}: {detail}", field, value)


def problem_body(
    status: int, kind: str, detail: str, request_id: str, errors: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "type": f"urn:recsys2stage:problem:{kind}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": request_id,
    }
    return body | ({"errors": list(errors)} if errors else {})


def problem_response(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, dict(headers or {}), MEDIA_TYPE)  # ASCII: any text can be sent


def shorten(value: Any) -> str:
    """A value as Python writes it, cut to a line."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def nearest(name: str, names: Iterable[str], step: str = "") -> str:
    """Text for a message: the most similar names, else the expected names and a next step."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?{step and f' {step[0].upper()}{step[1:]}'}"
    expected = f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}" if names else "none"
    return f"expected {expected}{step and f'; {step}'}"


def add_handlers(app: FastAPI) -> None:
    """Turns every error of an application into a problem."""
    handlers: dict[type[Exception], Any] = {
        Problem: _answer_problem,
        RequestValidationError: _answer_invalid,
        HTTPException: _answer_http,
        StoreError: _answer_store,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def request_id_of(request: Request) -> str:
    return str(getattr(request.state, "request_id", ""))


async def _answer_problem(request: Request, error: Problem) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return problem_response(error.status, error.body(request_id_of(request)), headers)


async def _answer_store(request: Request, error: StoreError) -> Response:
    detail = f"the store cannot be used ({error}); nothing was accepted, send the request again later"
    body = problem_body(503, "store", detail, request_id_of(request))
    return problem_response(503, body, {"Retry-After": "1"})


async def _answer_http(request: Request, error: HTTPException) -> Response:
    detail, path = str(error.detail), shorten(request.url.path)
    if error.status_code == 404:
        detail = f"there is no {path}, expected a path of this service; /openapi.json lists them"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        detail = f"{path} was called with {request.method}, expected {allowed}; /openapi.json lists all methods"
    elif error.status_code == 400:
        detail = f"the body cannot be read ({detail}), expected a JSON object in UTF-8; check how it is encoded"
    body = problem_body(
        error.status_code, HTTPStatus(error.status_code).name.lower().replace("_", "-"), detail, request_id_of(request)
    )
    return problem_response(error.status_code, body, error.headers)


async def _answer_invalid(request: Request, error: RequestValidationError) -> Response:
    route = request.scope.get("route")
    field = getattr(getattr(route, "body_field", None), "field_info", None)
    model = getattr(field, "annotation", None)
    raw, request_id = error.errors(), request_id_of(request)
    if any(one["type"] == "json_invalid" for one in raw):
        why = raw[0].get("ctx", {}).get("error", "no JSON")
        detail = f"the body is no JSON ({why} at byte {raw[0]['loc'][-1]}), expected a JSON object; check its syntax"
        return problem_response(400, problem_body(400, "no-json", detail, request_id))
    if isinstance(raw[0].get("input"), bytes):  # it was not read as JSON
        given = shorten(request.headers.get("content-type"))
        detail = f"the Content-Type is {given}, expected application/json; send this header with the body"
        return problem_response(415, problem_body(415, "no-json", detail, request_id))
    errors = [explain_invalid(one, model) for one in raw[:MAX_ERRORS]]
    detail = "; ".join(one["detail"] for one in errors[:3])
    more = f"; and {len(raw) - 3} more" if len(raw) > 3 else ""
    return problem_response(422, problem_body(422, "wrong-value", detail + more, request_id, errors))


def explain_invalid(error: Mapping[str, Any], model: Any = None) -> dict[str, Any]:
    """One error of pydantic: field, value, and a sentence with value, expectation and next step.

    Args:
        error: as pydantic gives it.
        model: the model of the body, for the names that an unknown field may have meant.
    """
    place = [part for part in error["loc"] if part not in ("body", "query", "path")]
    path = ".".join(map(str, place)) or "body"
    value, kind, context = error.get("input"), error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        detail = f"{path} is no field of the request; {nearest(str(place[-1]), fields_at(model, place[:-1]))}"
    elif kind == "missing":
        detail = f"{path} is missing; add it to the request"
        value = None
    elif kind == "value_error":
        detail = str(context.get("error", error["msg"]))
    else:
        expected = EXPECTED.get(kind) or error["msg"].removeprefix("Input should be ").removeprefix("Value should ")
        bounds = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in context.items()}
        step = "send it as text, in quotes" if kind == "string_type" and isinstance(value, int) else "correct it"
        field = next((part for part in reversed(place) if isinstance(part, str)), "")
        if field in TIMES and kind.startswith("int_") and kind != "int_parsing_size":
            expected, step = "seconds since 1970, such as 1714521600", "convert it to whole seconds"
        elif field == "history" and kind in OBJECT:
            return _error(path, value, f"{path} is {shorten(value)}, {HISTORY}")
        detail = f"{path} is {shorten(value)}, expected {expected.format(**bounds)}; {step}"
    return _error(path, value, detail)


EXPECTED = {  # error of pydantic -> what is expected
    "string_type": "text",
    "string_unicode": "text of valid Unicode",
    "string_too_short": "text of at least {min_length} character",
    "string_too_long": "text of at most {max_length} characters",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer of 64 bits",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
}


TIMES = ("time", "times", "request_time")  # fields in seconds
OBJECT = ("dict_type", "model_type", "model_attributes_type")
HISTORY = 'expected {"items": [...], "times": [...]}; send such an object'


def fields_at(model: Any, place: Sequence[Any]) -> list[str]:
    """The names of the fields of a nested model."""
    for part in place:
        model = next(
            (inner for inner in _models(model) if not isinstance(part, str) or part in inner.model_fields), model
        )
        if isinstance(part, str) and isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(part)
            model = None if field is None else field.annotation
    return [name for inner in _models(model) for name in inner.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _error(field: str, value: Any, detail: str) -> dict[str, Any]:
    plain = value if isinstance(value, str | int | bool | None) and len(str(value)) <= SHOWN else shorten(value)
    return {"field": field, "value": plain, "detail": detail}
