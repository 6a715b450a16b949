"""The settings: one frozen dataclass, read from the environment and `.env`.

Each field is the environment variable of the same name in upper case. The environment
wins over `.env`, and an empty value means the default. A bad value raises a
`SettingsError` whose one line names the variable and the fix.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent  # relative paths in settings start here

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_CLOSE = 0.88  # difflib's ratio: LOG_LEVLE is close to LOG_LEVEL, SSL_CERT_FILE is not to TLS_...
_NOT_OURS = {"LOGLEVEL"}  # other programs' variables that are close to ours


class SettingsError(Exception):
    """A setting that cannot be used; its text is the one line to show the user."""


def _seconds(text: str) -> float:
    """Parse a time above 0: a number of seconds, or a number and one of s, m and h."""
    unit = _SECONDS.get(text[-1:], 0)
    try:
        value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e9:
        raise ValueError("must be a time above 0, such as 30, 0.5, 90s, 10m or 1h")
    return value


def _seconds_or_off(text: str) -> float:
    if re.fullmatch(r"0+(\.0*)?[smh]?", text):
        return 0.0
    try:
        return _seconds(text)
    except ValueError:
        raise ValueError("must be a time such as 30, 90s, 10m or 1h, or 0 to turn it off") from None


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,15})\s*([KMG]?)(?:i?B)?", text, re.IGNORECASE | re.ASCII)
    if not match:
        raise ValueError("must be a number of bytes, such as 8388608, 8192K, 8M or 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


def _positive_size(text: str) -> int:
    if (value := _size(text)) == 0:
        raise ValueError("must be above 0 bytes, such as 64K or 8M")
    return value


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) == 0:
        raise ValueError("must be a number above 0")
    return int(text)


def _count_or_off(text: str) -> int:
    try:
        return 0 if text == "0" else _count(text)
    except ValueError:
        raise ValueError("must be a number, or 0 to turn it off") from None


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or not 1 <= int(text) <= 65535:
        raise ValueError("must be a port from 1 to 65535")
    return int(text)


def _listen_port(text: str) -> int:
    try:
        return 0 if text == "0" else _port(text)
    except ValueError as error:
        raise ValueError(f"{error}, or 0 for any free port") from None


def _host(text: str) -> str:
    if not re.fullmatch(r"[\w.:%-]+", text, re.ASCII):
        raise ValueError("must be a host name or an IP address, such as 0.0.0.0 or ::")
    return text


def _level(text: str) -> str:
    if text.upper() not in {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"}:
        raise ValueError("must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL")
    return text.upper()


def _log_format(text: str) -> str:
    if text.lower() not in {"text", "json"}:
        raise ValueError("must be text or json")
    return text.lower()


def _switch(text: str) -> bool:
    if text.lower() in {"true", "1", "yes", "on"}:
        return True
    if text.lower() in {"false", "0", "no", "off"}:
        return False
    raise ValueError("must be true or false")


def _labels(text: str) -> tuple[str, ...]:
    return tuple(label for part in text.split(",") if (label := part.strip()))


def _origins(text: str) -> tuple[str, ...]:
    patterns = _labels(text.lower())
    for pattern in patterns:
        if not _can_match(pattern):
            raise ValueError(
                "must be * or origins without a path, such as https://chat.example:8443,"
                " https://*.example.com or chrome-extension://*",
                pattern,
            )
    return patterns


# An origin as browsers write it (RFC 6454 section 6.2): scheme, host and a port that is not the
# scheme's default; in ASCII and lower case, and without a path.
_PATTERN = re.compile(
    r"(?P<scheme>[a-z*][a-z0-9+.*-]*)://"
    r"(?P<host>\[[0-9a-f:.*]+\]|[a-z0-9._~*%!$&'()+;=-]*)(?::(?P<port>[1-9*][0-9*]*))?"
)
_NO_SCHEME = re.compile(r"\*[a-z0-9.:_\[\]*-]*")  # the `*` covers the scheme
_WEB_PORTS = {"http": "80", "https": "443"}  # left out of an origin


def _can_match(pattern: str) -> bool:
    """Return whether any page's origin can match the pattern."""
    match = _PATTERN.fullmatch(pattern)
    if match is None:
        return _NO_SCHEME.fullmatch(pattern) is not None
    scheme, host, port = match["scheme"], match["host"], match["port"] or ""
    if scheme in _WEB_PORTS and (not host or port == _WEB_PORTS[scheme]):
        return False
    return "*" in port or int(port or 0) < 1 << 16


class Origins:
    """The origins of CORS_ORIGINS, compiled for matching.

    Args:
        patterns: origins, in each of which a `*` stands for any characters, as in
            OLLAMA_ORIGINS.

    """

    def __init__(self, patterns: tuple[str, ...]) -> None:
        encoded = [pattern.encode() for pattern in patterns]
        self._exact = frozenset(pattern for pattern in encoded if b"*" not in pattern)
        self._split = [pattern.split(b"*") for pattern in encoded if b"*" in pattern]

    def allow(self, origin: bytes) -> bool:
        """Return whether a page of this origin, the value of an `Origin` header, may call.

        The time is linear in the origin's length.
        """
        origin = origin.lower()
        return origin in self._exact or any(_fits(parts, origin) for parts in self._split)


def _fits(parts: list[bytes], origin: bytes) -> bool:
    """Return whether the parts between a pattern's stars follow one another in the origin."""
    first, *middle, last = parts
    at, end = len(first), len(origin) - len(last)
    if at > end or not (origin.startswith(first) and origin.endswith(last)):
        return False
    for part in middle:
        found = origin.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


def _networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    found = []
    for part in _labels(text):
        try:
            found.append(ip_network(part))
        except ValueError:
            wanted = "must be IP addresses and networks, such as 127.0.0.1,10.0.0.0/8,fd00::/8"
            raise ValueError(wanted, part) from None
    return tuple(found)


@dataclass(frozen=True, slots=True)
class CacheServer:
    """A Valkey or Redis server: where it is, and how to log in."""

    host: str
    port: int
    tls: bool
    database: int
    user: str = field(repr=False)
    password: str = field(repr=False)

    def __str__(self) -> str:
        """Write it as a URL without user and password."""
        scheme = "valkeys" if self.tls else "valkey"
        return f"{scheme}://{address(self.host, self.port)}/{self.database}"


_CACHE_SCHEMES = {"redis": False, "valkey": False, "rediss": True, "valkeys": True}  # with TLS?


def _cache_server(text: str) -> CacheServer:
    """Parse CACHE_URL. Options in its query would include one that turns verification off."""
    wrong = ValueError(
        "must be a URL such as valkey://USER:PASSWORD@127.0.0.1:6379/0, with the scheme valkey or"
        " redis, or with valkeys or rediss for TLS; in user and password, percent-encode what is"
        " not a letter or a digit"
    )
    try:
        url = urlsplit(text.strip())
        port = 6379 if url.port is None else url.port
    except ValueError:
        raise wrong from None
    database = url.path.removeprefix("/") or "0"
    good = url.scheme in _CACHE_SCHEMES and url.hostname and re.fullmatch(r"\d{1,5}", database)
    if not good or not port or url.query or url.fragment or not text.isascii():
        raise wrong
    user, password = unquote(url.username or ""), unquote(url.password or "")
    tls, host = _CACHE_SCHEMES[url.scheme], _host(url.hostname or "")
    return CacheServer(host, port, tls, int(database), user, password)


def _cache_url(text: str) -> str:
    _cache_server(text)
    return text


def _cache_secret(text: str) -> str:
    if len(text.encode("utf-8", "surrogateescape")) < 16:
        raise ValueError(
            "must have 16 bytes or more; `python keystore.py salt` makes one, for all processes"
        )
    return text


def _setting(default: Any, parse: Callable[[str], Any], *, secret: bool = False) -> Any:
    return field(default=default, metadata={"parse": parse}, repr=not secret)


@dataclass(frozen=True, slots=True)
class Settings:
    """The user's choices. Times are in seconds, sizes in bytes."""

    ollama_host: str = _setting("127.0.0.1", str)
    ollama_port: int = _setting(11434, _port)
    ollama_tls: bool = field(default=False)  # OLLAMA_HOST was an https URL
    listen_host: str = _setting("0.0.0.0", _host)
    listen_port: int = _setting(8000, _listen_port)
    api_key_file: str = _setting("", str)
    api_key_in_path: bool = _setting(False, _switch)
    admin_labels: tuple[str, ...] = _setting((), _labels)
    cors_origins: tuple[str, ...] = _setting((), _origins)
    api_key_salt: str = _setting("", str, secret=True)
    key_refresh: float = _setting(10.0, _seconds)
    key_defaults: str = _setting("", str)
    max_generations: int = _setting(0, _count_or_off)
    queue_max: int = _setting(100, _count)
    queue_timeout: float = _setting(600.0, _seconds)
    cache_ttl: float = _setting(3600.0, _seconds_or_off)
    cache_max_bytes: int = _setting(256 << 20, _positive_size)
    cache_max_entry_bytes: int = _setting(8 << 20, _positive_size)
    cache_only_deterministic: bool = _setting(False, _switch)
    cache_per_key: bool = _setting(False, _switch)
    cache_url: str = _setting("", _cache_url, secret=True)
    cache_secret: str = _setting("", _cache_secret, secret=True)
    cache_ca_file: str = _setting("", str)
    cache_timeout: float = _setting(0.05, _seconds)
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = _setting((), _networks)
    model_refresh: float = _setting(30.0, _seconds_or_off)
    max_body_bytes: int = _setting(32 << 20, _positive_size)
    max_object_bytes: int = _setting(32 << 20, _positive_size)
    max_head_bytes: int = _setting(16 << 10, _positive_size)
    max_connections: int = _setting(1024, _count)
    head_timeout: float = _setting(10.0, _seconds)
    body_timeout: float = _setting(60.0, _seconds)
    keepalive_timeout: float = _setting(75.0, _seconds)
    tls_cert_file: str = _setting("", str)
    tls_key_file: str = _setting("", str)
    ollama_ca_file: str = _setting("", str)
    connect_timeout: float = _setting(5.0, _seconds)
    first_byte_timeout: float = _setting(1800.0, _seconds)
    idle_timeout: float = _setting(300.0, _seconds)
    write_timeout: float = _setting(60.0, _seconds)
    drain_timeout: float = _setting(30.0, _seconds)
    log_level: str = _setting("INFO", _level)
    log_format: str = _setting("text", _log_format)
    warnings: tuple[str, ...] = field(default=())  # lines to log at the start

    @property
    def key_path(self) -> Path:
        """Path of the key file."""
        return program_path(self.api_key_file)

    @property
    def upstream_url(self) -> str:
        """URL of upstream."""
        return f"{'https' if self.ollama_tls else 'http'}://{self.upstream_address}"

    @property
    def listen_scheme(self) -> str:
        """Scheme of our own URLs."""
        return "https" if self.tls_cert_file else "http"

    @property
    def cache_server(self) -> CacheServer | None:
        """The server of the shared cache; None if there is none."""
        return _cache_server(self.cache_url) if self.cache_url else None

    @property
    def upstream_address(self) -> str:
        """Host and port of upstream, as in a URL or a `Host` header."""
        return address(self.ollama_host, self.ollama_port)

    @property
    def listen_address(self) -> str:
        """Host and port that we listen on, as in a URL."""
        return address(self.listen_host, self.listen_port)


def load(environ: Mapping[str, str], env_file: Path = ROOT / ".env") -> Settings:
    """Read and check all settings.

    Raises:
        SettingsError: a variable has a bad value, or `.env` cannot be read.

    """
    values = {**_read_env_file(env_file), **environ}
    chosen: dict[str, Any] = {}
    for item in (item for item in fields(Settings) if item.metadata):
        name = item.name.upper()
        text = values.get(name, "")
        if not text.strip():
            continue
        try:  # a salt keeps its white space
            chosen[item.name] = item.metadata["parse"](text.strip() if item.repr else text)
        except ValueError as error:
            wanted, bad = (*error.args, text.strip())[:2]  # a list's error also has the bad item
            shown = f", not {bad[:60]!r}" if item.repr else " (not shown)"
            raise SettingsError(f"{name} {wanted}{shown}") from None
    if "ollama_host" in chosen:
        chosen |= _upstream(chosen["ollama_host"], chosen.get("ollama_port"))
    budget = chosen.get("cache_max_bytes", Settings().cache_max_bytes)
    entry = chosen.get("cache_max_entry_bytes", Settings().cache_max_entry_bytes)
    chosen |= {"cache_max_entry_bytes": min(entry, budget), "warnings": _misspelt(values)}
    settings = Settings(**chosen)
    if bool(settings.tls_cert_file) != bool(settings.tls_key_file):
        raise SettingsError("TLS_CERT_FILE and TLS_KEY_FILE go together: set both, or neither")
    if settings.cache_url and not settings.cache_secret:
        raise SettingsError(
            "CACHE_URL needs CACHE_SECRET, the same in all processes:"
            " `python keystore.py salt` makes one"
        )
    return settings


def _misspelt(names: Iterable[str]) -> tuple[str, ...]:
    """Return a warning for each name that is almost one of ours.

    The environment is full of other programs' variables, so only a close match counts, and
    Ollama's own variables never do.
    """
    ours = [item.name.upper() for item in fields(Settings) if item.metadata]
    others = sorted(set(names).difference(ours, _NOT_OURS))
    meant = {
        name: get_close_matches(name.upper(), ours, 1, _CLOSE)
        for name in others
        if not name.upper().startswith("OLLAMA_")
    }
    return tuple(
        f"{name} is not a setting of OllProx: did you mean {close[0]}?"
        for name, close in meant.items()
        if close
    )


def _read_env_file(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        from dotenv.parser import parse_stream  # only needed if there is a .env
    except ModuleNotFoundError:
        raise SettingsError(
            f".env: reading {path} needs python-dotenv: run `make run`, which installs it in .venv,"
            " or use .venv/bin/python"
        ) from None
    found: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            for binding in parse_stream(file):
                if binding.error:
                    line = binding.original.line
                    raise SettingsError(f".env: {path}, line {line}, is not NAME=value")
                if binding.key is not None:
                    found[binding.key] = binding.value or ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SettingsError(f".env: {path} cannot be read: {reason}") from None
    return found


def _upstream(text: str, port: int | None) -> dict[str, Any]:
    """Parse OLLAMA_HOST, which may be written as for Ollama itself."""
    wrong = SettingsError(
        "OLLAMA_HOST must be a host name, HOST:PORT, or a URL such as"
        f" http://127.0.0.1:11434 with no path, not {text[:60]!r}"
    )
    if text.count(":") > 1 and "[" not in text and "//" not in text:
        text = f"[{text}]"  # a bare IPv6 address
    try:
        url = urlsplit(text if "//" in text else f"http://{text}")
        host, explicit = url.hostname or "", url.port
    except ValueError:
        raise wrong from None
    if url.scheme not in {"http", "https"} or url.username is not None or explicit == 0:
        raise wrong
    if url.path not in {"", "/"} or url.query or url.fragment or not host.isascii():
        raise wrong
    if not re.fullmatch(r"[\w.:%-]*", host, re.ASCII) or max(map(len, host.split("."))) > 63:
        raise wrong
    if ".." in host or host.startswith("."):
        raise wrong
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    tls = url.scheme == "https"
    default = 443 if tls else Settings().ollama_port
    return {"ollama_host": host, "ollama_port": explicit or port or default, "ollama_tls": tls}


def program_path(text: str) -> Path:
    """Return a path from the settings; a relative one starts at the program's folder."""
    return ROOT / Path(text).expanduser()


def address(host: str, port: int) -> str:
    """Return a host and a port as in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


REGISTRY = "registry.ollama.ai"  # the host of a model's name that has none


def normalize_model(name: str) -> str:
    """Write a model's name as Ollama lists it: ` Llama2:local` is `llama2:latest`.

    These are the rules of Ollama 0.33, from its `internal/modelref` and `types/model`: white
    space around the name is dropped, ASCII letters are in lower case, a scheme before a host is
    dropped, and so is `:local`. `:cloud` behind a tag is written `-cloud`. The default host
    registry.ollama.ai, then the default namespace `library`, are left out; the default tag is
    `latest`. A name that Ollama would refuse stays one that it refuses. Linear in the name.
    """
    name = name.strip()
    if not name:
        return ""
    name = _without_source(name.lower() if name.isascii() else name)
    _, scheme, rest = name.partition("://")
    parts = (rest if scheme and rest.count("/") == 2 else name).split("/")
    if len(parts) == 3 and parts[0] == REGISTRY:
        del parts[0]
    if len(parts) == 2 and parts[0] == "library":
        del parts[0]
    if ":" not in parts[-1]:
        parts[-1] += ":latest"
    return "/".join(parts)


def _without_source(name: str) -> str:
    """Drop the source `:local`, and write the source `:cloud` in one way.

    A name with two sources is an error to Ollama, and stays as it is.
    """
    base, source = _split_source(name)
    if not source or _split_source(base)[1]:
        return name
    if source == "local":
        return base
    return f"{base}-cloud" if ":" in base.rpartition("/")[2] else f"{base}:cloud"


def _split_source(name: str) -> tuple[str, str]:
    base, colon, tag = name.rpartition(":")
    tag = tag.strip()
    if colon and tag in {"local", "cloud"}:
        return base, tag
    if colon and tag.endswith("-cloud") and "/" not in tag:
        return f"{base}:{tag.removesuffix('-cloud')}", "cloud"
    return name, ""
