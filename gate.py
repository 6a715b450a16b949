"""Decide from a request's head alone whether it gets in, before its body is read.

`Gate.admit` checks, in this order: a forwarding loop, the path, the API key, the method, where
the request comes from, and the key's rights. It does no I/O and never waits.
"""

import logging
import math
import re
import time
from dataclasses import dataclass

from answers.ollama_api import Access, Form, Route, RouteTable
from keystore import MAX_WRONG, NO_SCHEME, Key, KeyStore, WrongKeys
from settings import Origins, Settings
from wire.http11 import Head, Headers, HTTPError, Response
from wire.upstream import loop_error, sent_by_us

log = logging.getLogger("ollprox")

WRONG_KEY = "wrong key"  # the kind of an HTTPError for a request without a valid key

# Only Bearer is offered. Basic works too, but after a Basic challenge a browser would attach the
# password to requests that other sites' pages make.
_CHALLENGE: Headers = ((b"WWW-Authenticate", b'Bearer realm="OllProx"'),)
_EXPOSED = b"Cache-Status, Age, X-Request-ID, Retry-After, Server-Timing"
_HEADER_NAMES = re.compile(rb"[\w!#$%&'*+.^`|~, -]+", re.ASCII)
_HOW_TO_SEND = {  # how clients of each API send a key
    Form.OLLAMA: "send yours in a header, as in curl -H 'APIKEY: <your key>' {}/call_model"
    """ -d '{{"model": "llama2", "prompt": "Hello"}}', or as 'Authorization: Bearer <your key>'""",
    Form.OPENAI: "send yours as 'Authorization: Bearer <your key>'; clients call it api_key",
    Form.ANTHROPIC: "send yours as 'x-api-key: <your key>'; clients call it api_key",
}


@dataclass(frozen=True, slots=True)
class Admission:
    """The route of an admitted request, its path upstream, and the caller's key.

    `key` is None on a route that needs no key.
    """

    route: Route
    target: bytes
    key: Key | None


class Gate:
    """Lets requests in.

    Args:
        settings: the allowed origins, and our own address for the example in an error.
        keys: the valid API keys.
        routes: the paths that exist.

    """

    def __init__(self, settings: Settings, keys: KeyStore, routes: RouteTable) -> None:
        self._here = f"{settings.listen_scheme}://localhost:{settings.listen_port}"
        self._origins = Origins(settings.cors_origins)
        self._named_origins = Origins(tuple(o for o in settings.cors_origins if o != "*"))
        self._keys = keys
        self._routes = routes
        self._wrong_keys = WrongKeys()

    def admit(self, head: Head, client: str) -> Admission:
        """Return the route and the key of a request that may proceed.

        Args:
            head: the request's head.
            client: the client's IP address; wrong keys are counted for each address.

        Raises:
            HTTPError: 401 no valid key, 403 not allowed, 404 no such path, 405 wrong method, 429
                too many wrong keys, 508 a forwarding loop.

        """
        if b"via" in head.names and sent_by_us(head.get(b"via") or b""):
            raise loop_error()
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

    def _authenticate(self, head: Head, client: str) -> Key:
        """Return the first valid key in a head. Raises HTTPError 401, 429."""
        now = time.time()
        for digest in head.credentials:
            if (key := self._keys.find(digest, now)) is not None:
                return key
        raise HTTPError(401, self._refusal(head, client, now), _CHALLENGE, kind=WRONG_KEY)

    def _refusal(self, head: Head, client: str, now: float) -> str:
        """Return what is wrong with a request's keys, and the fix. Raises HTTPError 429."""
        wrong = "there is no API key"
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
        """Count a wrong key. Raises HTTPError 429 beyond a few a minute from one address."""
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
        """Refuse requests from other sites' pages. Raises HTTPError 403.

        Browsers attach Basic passwords automatically, so any page that a user visits could use
        them. To manage models, a page's origin must be listed by name; `*` is not enough.
        """
        origin = head.get(b"origin")
        if origin is None and head.get(b"sec-fetch-site") != b"cross-site":
            return
        listed = self._named_origins if managing else self._origins
        if origin is not None and (_is_same_origin(head, origin) or listed.allow(origin)):
            return
        what = "managing models" if managing else "a Basic password"
        raise HTTPError(
            403,
            f"{what} is not accepted from pages of other sites: add the page's origin to"
            " CORS_ORIGINS, or send the key as a bearer from a program",
        )

    def cors(self, head: Head) -> Headers:
        """Return the headers that let a listed origin's page read the response."""
        origin = head.get(b"origin")
        if origin is None or not self._origins.allow(origin):
            return ()
        return (
            (b"Access-Control-Allow-Origin", origin),
            (b"Access-Control-Expose-Headers", _EXPOSED),
            (b"Vary", b"Origin"),
        )

    def preflight(self, head: Head) -> Response:
        """Answer a browser's CORS preflight request, which carries no key."""
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
    """Return how the log names a caller without a valid key: the start of the key's digest."""
    return next((d.hex()[:8] for d in head.credentials if d != NO_SCHEME), "-")


def _check_rights(route: Route, key: Key) -> None:
    """Check that a key may use a route. Raises HTTPError 403."""
    if route.access is Access.ADMIN and not key.admin:
        raise HTTPError(
            403,
            "managing models and the cache is for keys with the option admin, or whose label is in"
            " ADMIN_LABELS; ask the operator",
        )
    if route.access is Access.ANY_MODEL and key.models is not None:
        raise HTTPError(
            403,
            "this API key may use certain models only, and OllProx does not read which model this"
            " request is for; ask the operator for a key without models=",
        )


def _is_same_origin(head: Head, origin: bytes) -> bool:
    """Return True if the page was served from the address that it calls."""
    host = head.get(b"host")
    return host is not None and origin.partition(b"://")[2].lower() == host.lower()


def _wrong_method(route: Route) -> HTTPError:
    allowed = b", ".join(route.methods)
    return HTTPError(405, f"this path takes only {allowed.decode()}", ((b"Allow", allowed),))
