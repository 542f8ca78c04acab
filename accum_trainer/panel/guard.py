"""Which requests the panel answers: a page that starts processes must not obey other pages.

Any web page that its user visits can send requests to 127.0.0.1, and a name that its owner points
at 127.0.0.1 makes the panel the same origin as that page (DNS rebinding). So each request, the
handshake of a websocket included, must name this host, and come from a page of the panel itself if
it comes from a page. Where other machines can connect, a password is asked for. ASGI; knows nothing
of the pages behind it.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from accum_trainer.errors import ConfigError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

SHORTEST_PASSWORD = 8
LOGIN = "/login"
_COOKIE = "accum_trainer_panel"
_MOST_BYTES = 10_000  # of a login
# Nothing of another host is loaded, and no other page can show the panel in a frame. Vue compiles
# the page's templates, which needs eval.
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        b"style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; "
        b"object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    ),
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    # Not no-referrer, with which a browser sends the login from the origin "null".
    (b"referrer-policy", b"same-origin"),
]


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine can connect to `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, password: str | None) -> None:
    """Raise a ConfigError if the panel would be open to other machines, or its password is too
    short."""
    if password is not None and len(password) < SHORTEST_PASSWORD:
        raise ConfigError(
            f"the panel's password has {len(password)} characters; give at least "
            f"{SHORTEST_PASSWORD}"
        )
    if not is_loopback(host) and password is None:
        raise ConfigError(
            f"host={host} lets other machines start processes here; give a password with "
            "--password-file or ACCUM_TRAINER_PANEL_PASSWORD, or keep 127.0.0.1 and forward its "
            "port by ssh"
        )


class Guard:
    """Answers in the panel's place whatever it must not see.

    Args:
        app: the panel.
        host: the address that it listens on.
        password: asked for, if there is one.
    """

    def __init__(self, app: App, host: str, password: str | None) -> None:
        self.app = app
        self._listens_on = host.lower()
        self._password = password
        self._sessions: set[str] = set()
        self._one_login = asyncio.Lock()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        refusal = self._refusal(headers, scope)
        if refusal:
            return await _refuse(scope, receive, send, 403, refusal)
        if self._password is not None and not self._is_known(headers):
            if scope["type"] == "websocket":
                return await _refuse(scope, receive, send, 403, "log in first")
            return await self._log_in(scope, receive, send)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self.app(scope, receive, send_guarded)

    def _refusal(self, headers: dict[str, str], scope: Message) -> str:
        """Why the request is not answered, or ""."""
        host = headers.get("host", "")
        if not self._is_this_host(host):
            return f"host {host or 'missing'} is not this panel's"
        origin = headers.get("origin")
        own = (f"http://{host}".lower(), f"https://{host}".lower())
        if origin is not None and origin.lower() not in own:
            return f"a page of {origin or 'no origin'} may not use this panel"
        # A request without an origin: a link is followed, nothing else is fetched for other pages.
        is_link = (
            headers.get("sec-fetch-mode") == "navigate"
            and headers.get("sec-fetch-dest") == "document"
            and scope.get("method") in ("GET", "HEAD")
        )
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not is_link:
            return "another page may not use this panel"
        return ""

    def _is_this_host(self, header: str) -> bool:
        try:
            name = urlsplit(f"//{header}").hostname
        except ValueError:
            return False
        if not name:
            return False
        if is_loopback(name):
            return True
        if is_loopback(self._listens_on):
            return False
        # No name that somebody else's DNS could point here: addresses, and this machine's names.
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in {self._listens_on, socket.gethostname().lower()}
        return True

    def _is_known(self, headers: dict[str, str]) -> bool:
        cookies: SimpleCookie = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            return False
        session = cookies[_COOKIE].value if _COOKIE in cookies else ""
        return session in self._sessions

    async def _log_in(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer with the form; with the panel, once the password is right."""
        assert self._password is not None
        if scope["method"] != "POST" or scope["path"] != LOGIN:
            return await _respond(send, 401, _LOGIN_PAGE.replace("{said}", ""))
        body = b""
        while len(body) <= _MOST_BYTES:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        given = parse_qs(body.decode(errors="replace")).get("password", [""])[0]
        async with self._one_login:  # guesses wait for each other
            if not hmac.compare_digest(given.encode(), self._password.encode()):
                await asyncio.sleep(1.0)
                said = "This is not the password."
                return await _respond(send, 401, _LOGIN_PAGE.replace("{said}", said))
        session = secrets.token_urlsafe(32)
        self._sessions.add(session)
        cookie = f"{_COOKIE}={session}; HttpOnly; SameSite=Strict; Path=/"
        more = [(b"location", b"/"), (b"set-cookie", cookie.encode())]
        await _respond(send, 303, "", more)


async def _respond(
    send: Send, status: int, text: str, more: list[tuple[bytes, bytes]] | None = None
) -> None:
    kind = b"text/html; charset=utf-8"
    headers = [(b"content-type", kind), (b"cache-control", b"no-store"), *_HEADERS, *(more or [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


async def _refuse(scope: Message, receive: Receive, send: Send, status: int, why: str) -> None:
    if scope["type"] == "websocket":
        await receive()  # the handshake
        await send({"type": "websocket.close", "code": 1008, "reason": why[:100]})
        return
    plain = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": plain})
    await send({"type": "http.response.body", "body": f"refused: {why}\n".encode()})


_LOGIN_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>accum-trainer</title><style>
body{font:16px/1.5 system-ui,sans-serif;display:grid;place-items:center;min-height:90vh;margin:0}
form{display:grid;gap:.75rem;width:min(20rem,90vw)}input,button{font:inherit;padding:.6rem .75rem}
p{margin:0;min-height:1.5em}</style></head><body><form method="post" action="/login">
<h1 style="font-size:1.25rem;margin:0">accum-trainer panel</h1>
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" autofocus>
<button>Log in</button><p role="alert">{said}</p></form></body></html>"""
