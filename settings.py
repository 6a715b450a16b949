"""The settings: one frozen dataclass, read from the environment and `.env`.

Each field is the environment variable of the same name in upper case; the environment
wins over `.env`, and an empty value means the default. Whatever is wrong raises a
`SettingsError` whose one line names the variable and the mend.
"""

import ipaddress
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent  # relative paths in settings start here

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s,]+")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_CLOSE = 0.88  # difflib's ratio: LOG_LEVLE is close to LOG_LEVEL, SSL_CERT_FILE is not to TLS_...
_NOT_OURS = {"LOGLEVEL"}  # other programs' variables that are close to ours


class SettingsError(Exception):
    """A setting that cannot be used; its text is the one line to show the user."""


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e9:
        raise ValueError("must be a number of seconds above 0, such as 30 or 0.5")
    return value


def _seconds_or_off(text: str) -> float:
    if re.fullmatch(r"0+(\.0*)?", text):
        return 0.0
    try:
        return _seconds(text)
    except ValueError:
        raise ValueError("must be a number of seconds, or 0 to turn it off") from None


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


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or not 1 <= int(text) <= 65535:
        raise ValueError("must be a port from 1 to 65535")
    return int(text)


def _listen_port(text: str) -> int:
    try:
        return 0 if text == "0" else _port(text)
    except ValueError as error:
        raise ValueError(f"{error}, or 0 for a free one, which is shown at the start") from None


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
    origins = _labels(text.lower())
    if not all(origin == "*" or _ORIGIN.fullmatch(origin) for origin in origins):
        raise ValueError(
            "must be * or a list of origins with no path, such as https://chat.example:8443"
        )
    return origins


def _setting(default: Any, parse: Callable[[str], Any], *, secret: bool = False) -> Any:
    return field(default=default, metadata={"parse": parse}, repr=not secret)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user can choose. Times are in seconds, sizes in bytes."""

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
    cache_ttl: float = _setting(3600.0, _seconds_or_off)
    cache_max_bytes: int = _setting(256 << 20, _positive_size)
    cache_max_entry_bytes: int = _setting(8 << 20, _positive_size)
    cache_only_deterministic: bool = _setting(False, _switch)
    cache_per_key: bool = _setting(False, _switch)
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
        """Where the key file is."""
        return program_path(self.api_key_file)

    @property
    def upstream_url(self) -> str:
        """Upstream as a URL."""
        return f"{'https' if self.ollama_tls else 'http'}://{self.upstream_address}"

    @property
    def listen_scheme(self) -> str:
        """What our own URLs begin with."""
        return "https" if self.tls_cert_file else "http"

    @property
    def upstream_address(self) -> str:
        """Upstream's host and port as they stand in a URL or a `Host` header."""
        return address(self.ollama_host, self.ollama_port)

    @property
    def listen_address(self) -> str:
        """Our own host and port, likewise."""
        return address(self.listen_host, self.listen_port)


def load(environ: Mapping[str, str], env_file: Path = ROOT / ".env") -> Settings:
    """Read and check all settings.

    Raises:
        SettingsError: a variable that has a wrong value, or `.env` cannot be read.

    """
    values = {**_read_env_file(env_file), **environ}
    chosen: dict[str, Any] = {}
    for item in (item for item in fields(Settings) if item.metadata):
        name = item.name.upper()
        text = values.get(name, "")
        if not text.strip():
            continue
        try:  # a salt is taken as it stands
            chosen[item.name] = item.metadata["parse"](text.strip() if item.repr else text)
        except ValueError as error:
            raise SettingsError(f"{name} {error}, not {text.strip()[:60]!r}") from None
    if "ollama_host" in chosen:
        chosen |= _upstream(chosen["ollama_host"], chosen.get("ollama_port"))
    budget = chosen.get("cache_max_bytes", Settings().cache_max_bytes)
    entry = chosen.get("cache_max_entry_bytes", Settings().cache_max_entry_bytes)
    chosen |= {"cache_max_entry_bytes": min(entry, budget), "warnings": _misspelt(values)}
    settings = Settings(**chosen)
    if bool(settings.tls_cert_file) != bool(settings.tls_key_file):
        raise SettingsError("TLS_CERT_FILE and TLS_KEY_FILE go together: set both, or neither")
    _refuse_ourselves(settings)
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
        from dotenv.parser import parse_stream  # here, so that without .env nothing is needed
    except ModuleNotFoundError:
        raise SettingsError(
            f".env: to read {path}, python-dotenv has to be there: `make run` puts it into .venv,"
            " so start this with .venv/bin/python"
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
    """Take OLLAMA_HOST apart as Ollama's own variable of that name may be written."""
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


def _refuse_ourselves(settings: Settings) -> None:
    if settings.ollama_port != settings.listen_port:
        return
    ours, theirs = settings.listen_host, settings.ollama_host
    if _names(ours) & _names(theirs) or (_is_any(ours) and _is_loopback(theirs)):
        raise SettingsError(
            f"OLLAMA_HOST and OLLAMA_PORT name OllProx's own address ({settings.upstream_address});"
            " give Ollama's, which is usually 127.0.0.1:11434, or change LISTEN_PORT"
        )


def _names(host: str) -> set[str]:
    return {"127.0.0.1", "::1"} if host == "localhost" else {host}


def _is_any(host: str) -> bool:
    return host in {"0.0.0.0", "::"}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def program_path(text: str) -> Path:
    """Return a path of the settings; relative ones start at the program's folder."""
    return ROOT / Path(text).expanduser()


def address(host: str, port: int) -> str:
    """Write a host and a port as they stand in a URL."""
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
