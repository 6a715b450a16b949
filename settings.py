"""The settings: one frozen dataclass, read from the environment and `.env`.

Each field is the environment variable of the same name in upper case. The environment
overrides `.env`, and an empty value means the default. A bad value raises a
`SettingsError`; its message is one line with the variable and the fix.
"""

import base64
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit


def _place() -> tuple[Path, str]:
    """Return the folder of `.env`, at which relative paths start, and the command to run OllProx.

    The folder is that of the program, or of the zip application that it is in. Installed as a
    package, where alone an `__init__.py` stands beside it, it is the working folder.
    """
    folder = Path(__file__).resolve().parent
    if not folder.is_dir():
        return folder.parent, f"python {folder.name}"
    if (folder / "__init__.py").exists():
        return Path.cwd(), "ollprox"
    return folder, "python ollprox.py"


ROOT, COMMAND = _place()
KEY_FILE = "keys/keys.txt"  # the key file if API_KEY_FILE is not set, and the file is there

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_CLOSE = 0.88  # of difflib: LOG_LEVLE is a misspelt LOG_LEVEL, SSL_CERT_FILE is not TLS_...
_NOT_OURS = {"LOGLEVEL"}  # other programs' variables with similar names


class SettingsError(Exception):
    """A setting cannot be used; the message is the one line to show to the user."""


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
    """Return True if the origin of some page can match the pattern."""
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
        patterns: origins, in which `*` stands for any characters, as in OLLAMA_ORIGINS.

    """

    def __init__(self, patterns: tuple[str, ...]) -> None:
        encoded = [pattern.encode() for pattern in patterns]
        self._exact = frozenset(pattern for pattern in encoded if b"*" not in pattern)
        self._split = [pattern.split(b"*") for pattern in encoded if b"*" in pattern]

    def allow(self, origin: bytes) -> bool:
        """Return True if pages of an origin may call. Takes linear time.

        Args:
            origin: the value of an `Origin` header.

        """
        origin = origin.lower()
        return origin in self._exact or any(_fits(parts, origin) for parts in self._split)


def _fits(parts: list[bytes], origin: bytes) -> bool:
    """Return True if the parts between a pattern's stars occur in the origin in order."""
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


def _aliases(text: str) -> tuple[tuple[str, str], ...]:
    """Parse `ALIAS=MODEL` items; the names stay as they are written."""
    pairs = []
    for item in _labels(text):
        alias, _, model = (part.strip() for part in item.partition("="))
        if not (_MODEL_NAME.fullmatch(alias) and _MODEL_NAME.fullmatch(model)):
            raise ValueError(
                "must be names and models, such as gpt-4o=llama3.3,small=qwen3:4b", item
            )
        pairs.append((alias, model))
    aliases = [normalize_model(alias) for alias, _ in pairs]
    for index, (alias, model) in enumerate(pairs):
        if normalize_model(model) in aliases:
            raise ValueError("must not point an alias to an alias", f"{alias}={model}")
        if aliases[index] in aliases[:index]:
            raise ValueError("must name each alias once", f"{alias}={model}")
    return tuple(pairs)


_MODEL_NAME = re.compile(r"[a-zA-Z0-9][\w.:@/-]{0,255}", re.ASCII)


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
            f"must have 16 bytes or more; `{COMMAND} keys salt` makes one, for all processes"
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
    hosts: tuple["Host", ...] = field(
        default=(), compare=False
    )  # all of OLLAMA_HOST; `ollama_host` is the first
    upstream_api_key: str = _setting("", str, secret=True)
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
    model_aliases: tuple[tuple[str, str], ...] = _setting((), _aliases)  # alias, model
    usage_file: str = _setting("", str)
    usage_days: int = _setting(400, _count)
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
    heartbeat: float = _setting(0.0, _seconds_or_off)
    log_level: str = _setting("INFO", _level)
    log_format: str = _setting("text", _log_format)
    warnings: tuple[str, ...] = field(default=())  # lines to log at the start

    @property
    def key_path(self) -> Path:
        """Path of the key file; where none is set, the one that is read if it is there."""
        return program_path(self.api_key_file or KEY_FILE)

    @property
    def usage_path(self) -> Path:
        """Path of the usage file."""
        return program_path(self.usage_file)

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
    hosts = parse_hosts(
        chosen.get("ollama_host", Settings().ollama_host),
        chosen.get("ollama_port"),
        chosen.get("upstream_api_key", ""),
    )
    first = hosts[0]
    chosen |= {"hosts": hosts, "ollama_host": first.host, "ollama_port": first.port}
    chosen["ollama_tls"] = first.tls
    budget = chosen.get("cache_max_bytes", Settings().cache_max_bytes)
    entry = chosen.get("cache_max_entry_bytes", Settings().cache_max_entry_bytes)
    chosen |= {"cache_max_entry_bytes": min(entry, budget), "warnings": _misspelt(values)}
    settings = Settings(**chosen)
    if bool(settings.tls_cert_file) != bool(settings.tls_key_file):
        raise SettingsError("TLS_CERT_FILE and TLS_KEY_FILE go together: set both, or neither")
    if settings.cache_url and not settings.cache_secret:
        raise SettingsError(
            "CACHE_URL needs CACHE_SECRET, the same in all processes:"
            f" `{COMMAND} keys salt` makes one"
        )
    return settings


def _misspelt(names: Iterable[str]) -> tuple[str, ...]:
    """Return a warning for each name that looks like a misspelt setting.

    The environment is full of other programs' variables, so only a close match counts, and
    Ollama's variables never do.
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


def program_path(text: str) -> Path:
    """Return a path from the settings; a relative one starts at the program's folder."""
    return ROOT / Path(text).expanduser()


def address(host: str, port: int) -> str:
    """Return a host and a port as in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


REGISTRY = "registry.ollama.ai"  # the default host of a model's name


MAX_NAME_CHARS = 600  # of a model; Ollama takes 350 for the host and 80 for each other part


def normalize_model(name: str) -> str:
    """Return a model's name as Ollama lists it: ` Llama2:local` is `llama2:latest`.

    These are the rules of Ollama 0.33, from its `internal/modelref` and `types/model`: white
    space around the name is dropped, ASCII letters are in lower case, a scheme before a host is
    dropped, and so is `:local`. `:cloud` behind a tag is written `-cloud`. The default host
    registry.ollama.ai, then the default namespace `library`, are left out; the default tag is
    `latest`. A name that Ollama refuses is still refused afterwards. Takes linear time.
    """
    # Longer names, which no model has, would take too much memory to remember.
    return _known_name(name) if len(name) <= MAX_NAME_CHARS else _normalized(name)


def _normalized(name: str) -> str:
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


_known_name = lru_cache(1024)(_normalized)


def _without_source(name: str) -> str:
    """Drop the source `:local`, and normalize the source `:cloud`.

    A name with two sources is an error in Ollama, and is returned unchanged.
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


# Several Ollama servers: OLLAMA_HOST is a list, and each may need credentials.


@dataclass(frozen=True, slots=True)
class Host:
    """One Ollama server of OLLAMA_HOST.

    `name` identifies it to people: the host, or `HOST:PORT` if two servers share a host.
    `authorization` is the value of the `Authorization` header for this server alone, empty for
    none; it is never shown.
    """

    host: str
    port: int
    tls: bool = False
    weight: float = 1.0
    name: str = ""
    authorization: str = field(default="", repr=False)

    @property
    def address(self) -> str:
        """Host and port, as in a URL or a `Host` header."""
        return address(self.host, self.port)

    @property
    def url(self) -> str:
        """The URL, without credentials."""
        return f"{'https' if self.tls else 'http'}://{self.address}"


_WEIGHT = re.compile(r"(.*[^*])\*([0-9]+(?:\.[0-9]+)?)", re.DOTALL)
_HOST_NAME = re.compile(r"[\w.:%-]*", re.ASCII)
_TOKEN = re.compile(r"[!-~]+")
_ANY_ADDRESS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def parse_hosts(text: str, default_port: int | None, api_key: str = "") -> tuple[Host, ...]:
    """Parse OLLAMA_HOST: servers separated by commas, each optionally followed by `*WEIGHT`.

    A server is a host, `HOST:PORT` or a URL, as for Ollama itself. A URL may have credentials,
    percent-encoded, as in `https://user:password@host`.

    Args:
        text: the variable's value.
        default_port: OLLAMA_PORT, for servers without a port; None if it is not set.
        api_key: UPSTREAM_API_KEY; see `_give_keys`.

    Raises:
        SettingsError: a variable has a bad value. The text shows no credentials.

    """
    # A comma that is not percent-encoded in a password cuts it, so the whole list is looked at.
    secret = "@" in text
    hosts = [_parse_host(part.strip(), default_port, secret) for part in text.split(",")]
    seen = set()
    for host in hosts:
        if host.address in seen:
            raise SettingsError(f"OLLAMA_HOST has {host.address} twice: list each server once")
        seen.add(host.address)
    names = [host.host for host in hosts]
    named = [
        replace(host, name=host.host if names.count(host.host) == 1 else host.address)
        for host in hosts
    ]
    return tuple(_give_keys(named, api_key) if api_key else named)


def _parse_host(text: str, default_port: int | None, secret: bool) -> Host:
    """Parse one entry of OLLAMA_HOST, which errors do not show if it may hold a secret."""
    shown = "one with credentials" if secret else repr(text[:60])
    wrong = SettingsError(
        "OLLAMA_HOST must be a host name, HOST:PORT, or a URL such as http://127.0.0.1:11434"
        f" with no path, or a list of them separated by commas, not {shown}"
    )
    weight = 1.0
    if (match := _WEIGHT.fullmatch(text)) is not None:
        text, weight = match[1], float(match[2])
        if not 0 < weight < math.inf:
            raise SettingsError("OLLAMA_HOST has a server with weight 0: weights are above 0")
    if text.count(":") > 1 and "[" not in text and "//" not in text:
        text = f"[{text}]"  # a bare IPv6 address
    try:
        url = urlsplit(text if "//" in text else f"http://{text}")
        name, port = url.hostname or "", url.port
    except ValueError:
        raise wrong from None
    if url.scheme not in {"http", "https"} or url.path not in {"", "/"} or port == 0:
        raise wrong
    if url.query or url.fragment or not _is_host(name) or (not text and not name):
        raise wrong
    tls = url.scheme == "https"
    port = port or default_port or (443 if tls else Settings().ollama_port)
    host = _ANY_ADDRESS.get(name, name)
    return Host(host, port, tls, weight, host, _basic(url.username, url.password))


def _is_host(name: str) -> bool:
    """Return True if a name can be a host name."""
    if not _HOST_NAME.fullmatch(name) or ".." in name or name.startswith("."):
        return False
    return max(map(len, name.split("."))) <= 63


def _basic(user: str | None, password: str | None) -> str:
    """Return `Authorization` for a URL's user and password (RFC 7617); empty for none."""
    if user is None and password is None:
        return ""
    pair = unquote_to_bytes(user or "") + b":" + unquote_to_bytes(password or "")
    return f"Basic {base64.b64encode(pair).decode()}"


def _give_keys(hosts: list[Host], text: str) -> list[Host]:
    """Return the servers with the keys of UPSTREAM_API_KEY, as bearer tokens.

    It is one key, for all https servers without credentials, or a list of `NAME=KEY` separated
    by commas. It is a list only if it begins with a server's name and `=`.
    """
    names = {host.name for host in hosts}
    parts = [part.strip() for part in text.split(",")]
    keys = {host.name: text for host in hosts if host.tls and not host.authorization}
    if parts[0].rpartition("=")[1] and parts[0].partition("=")[0] in names:
        keys = dict(_named_key(part, names) for part in parts)
    elif not keys:
        raise SettingsError(
            "UPSTREAM_API_KEY is sent only to https servers, and OLLAMA_HOST has none without"
            " credentials: write NAME=KEY to send it to the server of that name"
        )
    if not all(_TOKEN.fullmatch(key) for key in keys.values()):
        raise SettingsError("UPSTREAM_API_KEY has a key that is empty or has white space in it")
    if any(host.authorization for host in hosts if host.name in keys):
        raise SettingsError(
            "UPSTREAM_API_KEY names a server that has credentials in OLLAMA_HOST: keep one of them"
        )
    return [
        replace(host, authorization=f"Bearer {keys[host.name]}") if host.name in keys else host
        for host in hosts
    ]


def _named_key(part: str, names: set[str]) -> tuple[str, str]:
    """Parse `NAME=KEY`."""
    name, _, key = part.partition("=")
    if name not in names:
        raise SettingsError(
            "UPSTREAM_API_KEY must be one key, or NAME=KEY for servers of OLLAMA_HOST, whose names"
            f" are {', '.join(sorted(names))}"
        )
    return name, key
