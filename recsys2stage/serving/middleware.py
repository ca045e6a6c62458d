"""What every request passes before the routes: keys, the body's limit, the time limit, a request id, the log, CORS."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import http
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from recsys2stage.serving.monitoring import Metrics
from recsys2stage.serving.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/healthz", "/readyz")  # probes of load balancers, which have no key; they answer nothing but that
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
CHALLENGE = b'Basic realm="recsys", Bearer realm="recsys"'  # a browser asks for a password: the key
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
SAFE = (  # of every answer, unless a route sets its own
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"),
)

logger = logging.getLogger("recsys2stage.serving")


class Refused(Exception):
    """A request that is answered before it reaches a route."""

    def __init__(self, status: int, detail: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


def install(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    """Adds the middleware to an application. Routes find `request.state.request_id`, and log by `request.state.fields`.

    Args:
        app: the application, before it starts.
        settings: keys, limits, CORS.
        metrics: where requests are counted.
    """
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    if settings.cors:  # outside of the guard: a browser's preflight request has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "X-API-Key", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Server-Timing", "Retry-After", "Idempotency-Replayed"],
            max_age=600,
        )


class Guard:
    """ASGI middleware around the routes.

    Args:
        app: what it passes requests to.
        settings: keys and limits.
        metrics: where requests are counted.
    """

    def __init__(self, app: Application, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.digests = [hashlib.sha256(key).digest() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, headers = time.perf_counter(), 0, dict(scope["headers"])
        request_id = choose_request_id(headers.get(b"x-request-id"))
        fields: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, fields=fields)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message.setdefault("headers", [])}
                own = ((b"x-request-id", request_id.encode()), *SAFE)
                message["headers"] = [*message["headers"], *(pair for pair in own if pair[0] not in given)]
            await send(message)

        try:
            try:
                if self.digests and scope["path"] not in OPEN and not self.is_known(headers):
                    raise Refused(401, "", ((b"www-authenticate", CHALLENGE),))
                async with asyncio.timeout(self.settings.timeout):
                    if has_body(headers):
                        receive = await self.with_body(headers, receive)
                    await self.app(scope, receive, answer)
            except TimeoutError as error:
                seconds = self.settings.timeout
                raise Refused(
                    504, f"the request took more than {seconds:g} seconds; ask for less, or try again later"
                ) from error
        except Refused as refused:
            if not status:
                await send_problem(answer, refused, request_id)
        except Exception:
            logger.exception("a request failed", extra={"fields": {"request_id": request_id}})
            if not status:
                await send_problem(answer, Refused(500, f"the log names the cause under {request_id}"), request_id)
            else:
                raise  # the answer has begun, and the server closes the connection
        finally:
            self.record(scope, status, time.perf_counter() - started, request_id, fields)

    def is_known(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request has a valid key, in the same time whichever it has."""
        digest = hashlib.sha256(presented_key(headers)).digest()
        return any([hmac.compare_digest(digest, known) for known in self.digests])  # a list: all are compared

    async def with_body(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Reads a body up to the limit; returns a `receive` that gives it at once."""
        limit, body = self.settings.max_body, bytearray()
        declared = headers.get(b"content-length", b"")
        size = int(declared) if declared.isdigit() else 0
        while size <= limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body += message.get("body", b"")
            size = max(size, len(body))
            if not message.get("more_body", False):
                break
        if size > limit:
            raise Refused(
                413,
                f"the body has {'at least ' if not declared else ''}{size:,} bytes, expected at most {limit:,}; send "
                "fewer entries at once",
                ((b"connection", b"close"),),
            )
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return replay

    def record(self, scope: Scope, status: int, seconds: float, request_id: str, fields: dict[str, Any]) -> None:
        """Counts and logs a request, by its route's template: paths and queries hold ids of users."""
        route = getattr(scope.get("route"), "path", "") or "other"
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        self.metrics.observe_request(method, route, status, seconds)
        if self.settings.log_requests:
            line = {"request_id": request_id, "method": method, "route": route, "status": status}
            logger.info("request", extra={"fields": line | {"ms": round(seconds * 1e3, 2)} | fields})


def choose_request_id(given: bytes | None) -> str:
    """The caller's X-Request-ID where it is a plain word of at most 64 characters, else a random one."""
    text = (given or b"").decode("latin-1")
    return text if REQUEST_ID.fullmatch(text) else uuid.uuid4().hex


def presented_key(headers: dict[bytes, bytes]) -> bytes:
    """The key of a request: X-API-Key, a bearer token, or the password of HTTP basic authentication."""
    if key := headers.get(b"x-api-key"):
        return key
    scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def has_body(headers: dict[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


async def send_problem(send: Send, refused: Refused, request_id: str) -> None:
    """Answers with a problem of RFC 9457; with nothing but the status to someone without a key."""
    problem = {"type": "about:blank", "title": http.HTTPStatus(refused.status).phrase, "status": refused.status}
    if refused.status != http.HTTPStatus.UNAUTHORIZED:
        problem |= {"detail": refused.detail, "instance": request_id}
    body = json.dumps(problem).encode()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refused.status, "headers": [*headers, *refused.headers]})
    await send({"type": "http.response.body", "body": body})
