"""Only this machine's own pages may talk to the server, and its pages talk to nothing else."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OWN = ("127.0.0.1", "localhost", "::1")
# Vue compiles templates in the browser, which is what the two `unsafe` are for.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' ws://127.0.0.1:* ws://localhost:*; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
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
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not is_own(headers.get("host", ""), headers.get("origin")):
            await self._refuse(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                added["Content-Security-Policy"] = POLICY
                added["Referrer-Policy"] = "no-referrer"
                added["Cross-Origin-Resource-Policy"] = "same-origin"
                added["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self.app(scope, receive, send_with_policy)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await PlainTextResponse(REFUSAL, status_code=403)(scope, receive, send)
