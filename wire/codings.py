"""Decompress request bodies (RFC 9110 section 8.4), within a limit."""

import contextlib
import importlib
import zlib
from typing import Any

from wire.http11 import HTTPError

MAX_WINDOW = 23  # log2 of the largest zstd window in bytes (RFC 9659)

_zstd: Any = None
_errors: tuple[type[Exception], ...] = (zlib.error,)
with contextlib.suppress(ModuleNotFoundError):
    _zstd = importlib.import_module("compression.zstd")  # since Python 3.14
    _errors += (_zstd.ZstdError,)


def coding_of(value: bytes | None, *, accepted: bool) -> bytes:
    """Return the coding of a `Content-Encoding` header; empty for none.

    Raises:
        HTTPError: 415 for an unknown coding, or if codings are not `accepted` on the route.

    """
    coding = (value or b"").strip().lower()
    if coding in {b"", b"identity"}:
        return b""
    if not accepted:
        message = "only /v1 routes take a compressed body: send it without Content-Encoding"
        raise HTTPError(415, message, ((b"Accept-Encoding", b"identity"),))
    if coding == b"zstd" and _zstd is None:
        raise _unsupported(
            "OllProx needs Python 3.14 to read zstd: turn request compression off in the client"
            " (Codex: `enable_request_compression = false` under [features] in config.toml)"
        )
    if coding not in {b"gzip", b"x-gzip", b"zstd"}:
        raise _unsupported("the body's Content-Encoding must be gzip or zstd, and only one")
    return coding


def decompress(coding: bytes, body: bytes, limit: int) -> bytes:
    """Decompress a body. Never produces more than `limit` + 1 bytes.

    Only a single gzip member or zstd frame is accepted, since many small ones are slow to read.

    Raises:
        HTTPError: 413 beyond the limit, 400 if it is not one complete gzip member or zstd frame.

    """
    name = "zstd" if coding == b"zstd" else "gzip"
    decoder = _decoder(coding)
    try:
        plain: bytes = decoder.decompress(body, limit + 1)
    except _errors:
        raise HTTPError(400, f"the body cannot be decompressed as {name}") from None
    if len(plain) > limit:
        what = f"decompressed, the body is larger than {limit} bytes (MAX_BODY_BYTES)"
        raise HTTPError(413, what)
    if not decoder.eof or decoder.unused_data:
        raise HTTPError(400, f"the body must be one complete {name} stream")
    return plain


def _decoder(coding: bytes) -> Any:
    if coding == b"zstd":
        parameter = _zstd.DecompressionParameter.window_log_max
        return _zstd.ZstdDecompressor(options={parameter: MAX_WINDOW})
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: gzip only


def _unsupported(message: str) -> HTTPError:
    accepted = b"gzip, zstd" if _zstd else b"gzip"
    return HTTPError(415, message, ((b"Accept-Encoding", accepted),))
