"""Only this machine's own pages may talk to the server, and its pages talk to nothing else."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OWN = ("127.0.0.1", "localhost", "::1")
ADDED = {
    # Vue compiles templates in the browser, which is what the two `unsafe` are for.
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' ws://127.0.0.1:* ws://localhost:*; "
        "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
REFUSAL = "This page answers only to this machine's own name: open http://127.0.0.1 with its port.\n"


def is_own(host: str, origin: str | None) -> bool:
    """Whether a request is to this machine by one of its own names, and not from another site's page."""
    try:
        return urlsplit(f"//{host}").hostname in OWN and (origin is None or urlsplit(origin).netloc == host)
    except ValueError:
        return False


class OwnHostOnly:
    """Refuse requests and sockets under another host's name (DNS rebinding) or from another site's page."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(ADDED)
            await send(message)

        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            if not is_own(headers.get("host", ""), headers.get("origin")):
                await PlainTextResponse(REFUSAL, status_code=403)(scope, receive, send)
                return
        await self.app(scope, receive, send_with_policy)
