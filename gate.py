"""Decide from a request's head alone whether it gets in, before its body is read.

`Gate.admit` checks, in this order: a forwarding loop, the path, the API key, the method, where
the request comes from, and the key's rights. It does no I/O and never waits.
"""

import logging
import math
import re
import time
from dataclasses import dataclass

from access.credentials import MAX_WRONG, NO_SCHEME, WrongKeys
from access.rights import Key
from answers.ollama_api import HOME, Access, Form, Route, RouteTable
from keystore import KeyStore
from settings import Origins, Settings
from wire.http11 import Head, Headers, HTTPError, Response
from wire.upstream import loop_error, sent_by_us

log = logging.getLogger("ollprox")

WRONG_KEY = "wrong key"  # the kind of an HTTPError for a request without a valid key

# Basic works too but is not offered: a browser would then attach the password to requests that
# pages of other sites make.
_CHALLENGE: Headers = ((b"WWW-Authenticate", b'Bearer realm="OllProx"'),)
_EXPOSED = b"Cache-Status, Age, X-Request-ID, Retry-After, Server-Timing"
_HEADER_NAMES = re.compile(rb"[\w!#$%&'*+.^`|~, -]+", re.ASCII)
_HOW_TO_SEND = {  # a key, by the form of the API: the headers that its clients use
    Form.OLLAMA: "send yours in a header, as in curl -H 'APIKEY: <your key>' {}/call_model"
    """ -d '{{"model": "llama2", "prompt": "Hello"}}', or as 'Authorization: Bearer <your key>'""",
    Form.OPENAI: "send yours as 'Authorization: Bearer <your key>'; clients call it api_key",
    Form.ANTHROPIC: "send yours as 'x-api-key: <your key>'; clients call it api_key",
}


@dataclass(slots=True)
class Admission:
    """A request that was let in.

    `target` is the path to request upstream. `key` is None if the route needs no key.
    """

    route: Route
    target: bytes
    key: Key | None


class Gate:
    """Lets requests in.

    Args:
        settings: the allowed origins, and our own address for examples in errors.
        keys: the valid API keys.
        routes: the known paths.

    """

    def __init__(self, settings: Settings, keys: KeyStore, routes: RouteTable) -> None:
        self._here = f"{settings.listen_scheme}://localhost:{settings.listen_port}"
        self._origins = Origins(settings.cors_origins)
        self._named_origins = Origins(tuple(o for o in settings.cors_origins if o != "*"))
        self._keys = keys
        self._routes = routes
        self._wrong_keys = WrongKeys()

    def admit(self, head: Head, client: str) -> Admission:
        """Let a request in, or refuse it.

        Args:
            head: of the request.
            client: its IP address, for counting wrong keys.

        Raises:
            HTTPError: 401 no valid key, 403 not allowed, 404 unknown path, 405 wrong method, 429
                too many wrong keys, 508 forwarding loop.

        """
        if b"via" in head.names and sent_by_us(head.get(b"via") or b""):
            raise loop_error()
        if head.path == b"/" and _is_for_a_page(head):
            return Admission(HOME, b"", None)
        found = self._routes.find(head.path)
        if found is None:
            self._authenticate(head, client)  # only callers with a key learn which paths exist
            raise HTTPError(404, f"OllProx has no such path; {self._routes.hint(head.path)}")
        route, target = found
        if head.method == b"OPTIONS":
            raise _wrong_method(route)  # a preflight from an origin that is not listed
        key = None if route.access is Access.OPEN else self._authenticate(head, client)
        if head.method not in route.methods:
            raise _wrong_method(route)
        if head.basic or route.access is Access.ADMIN:
            self._refuse_foreign(head, managing=route.access is Access.ADMIN)
        if key is not None and route.access is not Access.KEY:
            _check_rights(route, key)
        return Admission(route, target, key)

    def identify(self, head: Head) -> Key | None:
        """Return the first valid key that a head presents; None if there is none."""
        now = time.time()
        for digest in head.credentials:
            if (key := self._keys.find(digest, now)) is not None:
                return key
        return None

    def _authenticate(self, head: Head, client: str) -> Key:
        """Return the caller's key. Raises HTTPError 401, 429."""
        key = self.identify(head)
        if key is None:
            raise HTTPError(401, self._refusal(head, client), _CHALLENGE, kind=WRONG_KEY)
        return key

    def _refusal(self, head: Head, client: str) -> str:
        """Say why no key lets the request in, and what would. Raises HTTPError 429."""
        now, wrong = time.time(), "there is no API key"
        if presented := [digest for digest in head.credentials if digest != NO_SCHEME]:
            if any(self._keys.expired(digest, now) for digest in presented):
                return "the API key has expired; ask the operator for a new one"
            for _ in presented:
                self._slow_down(client)
            wrong = "the API key is not valid"
        if NO_SCHEME in head.credentials:
            wrong += " (in Authorization, write Bearer before it)"
        how = _HOW_TO_SEND[self._routes.form(head.path)].format(self._here)
        return f"{wrong}: {how}"

    def _slow_down(self, client: str) -> None:
        """Count a wrong key. Raises HTTPError 429 after `MAX_WRONG` from one address."""
        count, left = self._wrong_keys.count(client)
        if count == MAX_WRONG + 1:
            log.warning("%s has sent %d wrong API keys within a minute", client, count)
        if count > MAX_WRONG:
            raise HTTPError(
                429,
                "too many wrong API keys from this address; a valid one is served at once",
                ((b"Retry-After", b"%d" % math.ceil(left)),),
                kind=WRONG_KEY,
            )

    def _refuse_foreign(self, head: Head, *, managing: bool) -> None:
        """Refuse requests from pages of other sites. Raises HTTPError 403.

        Browsers attach Basic passwords on their own, so any page that a user visits could use
        them. To manage models, a page's origin must be listed by name; `*` is not enough.
        """
        origin = head.get(b"origin")
        if origin is None and head.get(b"sec-fetch-site") != b"cross-site":
            return
        listed = self._named_origins if managing else self._origins
        if origin is not None and (_is_same_origin(head, origin) or listed.allow(origin)):
            return
        what = "managing models" if managing else "a password of Basic"
        raise HTTPError(
            403,
            f"{what} is not accepted from pages of other sites: add the page's origin to"
            " CORS_ORIGINS, or send the key as a bearer from a program",
        )

    def cors(self, head: Head) -> Headers:
        """Return the CORS headers for a response; none unless the origin is listed."""
        origin = head.get(b"origin")
        if origin is None or not self._origins.allow(origin):
            return ()
        return (
            (b"Access-Control-Allow-Origin", origin),
            (b"Access-Control-Expose-Headers", _EXPOSED),
            (b"Vary", b"Origin"),
        )

    def preflight(self, head: Head) -> Response:
        """Answer a CORS preflight; browsers send it without a key."""
        found = self._routes.find(head.path)
        methods = b", ".join(found[0].methods) if found else b"GET, POST"
        wanted = head.get(b"access-control-request-headers") or b""
        allowed = [
            (b"Access-Control-Allow-Methods", methods),
            (b"Access-Control-Max-Age", b"600"),
        ]
        if _HEADER_NAMES.fullmatch(wanted):
            allowed.append((b"Access-Control-Allow-Headers", wanted))
        if head.get(b"access-control-request-private-network") == b"true":
            allowed.append((b"Access-Control-Allow-Private-Network", b"true"))
        return Response(204, tuple(allowed), b"")


def caller(head: Head) -> str:
    """Return what the log shows for a caller without a valid key: part of a digest."""
    return next((d.hex()[:8] for d in head.credentials if d != NO_SCHEME), "-")


def _check_rights(route: Route, key: Key) -> None:
    """Refuse a key that may not use a route. Raises HTTPError 403."""
    if route.access is Access.ADMIN and not key.admin:
        raise HTTPError(
            403,
            "managing models and the cache is for keys with the option admin, or whose label is in"
            " ADMIN_LABELS; ask the operator",
        )
    if route.access is Access.ANY_MODEL and key.models is not None:
        raise HTTPError(
            403,
            "this API key may use certain models only, and OllProx does not read which one this"
            " request asks; ask the operator for a key without models=",
        )


def _is_for_a_page(head: Head) -> bool:
    """Return True if a browser asks for a page to show."""
    accept = head.get(b"accept")
    return head.method == b"GET" and accept is not None and b"text/html" in accept.lower()


def _is_same_origin(head: Head, origin: bytes) -> bool:
    """Return True if the page came from the host that it calls."""
    host = head.get(b"host")
    return host is not None and origin.partition(b"://")[2].lower() == host.lower()


def _wrong_method(route: Route) -> HTTPError:
    allowed = b", ".join(route.methods)
    return HTTPError(405, f"this path takes only {allowed.decode()}", ((b"Allow", allowed),))
