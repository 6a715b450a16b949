from dataclasses import fields
from pathlib import Path

import pytest

from settings import Origins, Settings, SettingsError, load, normalize_model

NOWHERE = Path("/nonexistent/.env")


def loaded(**environ: str) -> Settings:
    return load(environ, NOWHERE)


def test_defaults_need_nothing() -> None:
    settings = loaded()
    assert (settings.ollama_host, settings.ollama_port) == ("127.0.0.1", 11434)
    assert (settings.listen_host, settings.listen_port) == ("0.0.0.0", 8000)
    assert (settings.cache_ttl, settings.cache_max_bytes) == (3600, 256 << 20)
    assert (settings.cache_max_entry_bytes, settings.key_refresh) == (8 << 20, 10)
    assert (settings.connect_timeout, settings.first_byte_timeout) == (5, 1800)
    assert (settings.idle_timeout, settings.write_timeout, settings.drain_timeout) == (300, 60, 30)
    assert (settings.max_body_bytes, settings.max_object_bytes) == (32 << 20, 32 << 20)


def test_an_empty_value_means_the_default() -> None:
    assert loaded(**{item.name.upper(): " " for item in fields(Settings)}) == Settings()


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("64K", 65536), ("64k", 65536), ("2MiB", 2 << 20), ("1 GB", 1 << 30)],
)
def test_sizes_may_have_units(text: str, size: int) -> None:
    assert loaded(CACHE_MAX_BYTES=text).cache_max_bytes == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("0.5", 0.5), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("0", 0), ("0m", 0)],
)
def test_times_may_have_one_unit(text: str, seconds: float) -> None:
    assert loaded(CACHE_TTL=text).cache_ttl == seconds


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("OLLAMA_PORT", "0"),
        ("OLLAMA_PORT", "65536"),
        ("OLLAMA_PORT", "٣٣٣٣"),
        ("LISTEN_PORT", "http"),
        ("LISTEN_PORT", "-1"),
        ("LISTEN_HOST", "a b"),
        ("CACHE_TTL", "-1"),
        ("CACHE_TTL", "nan"),
        ("CACHE_TTL", "inf"),
        ("CACHE_TTL", "soon"),
        ("KEY_REFRESH", "0"),
        ("CACHE_MAX_BYTES", "12X"),
        ("CACHE_MAX_BYTES", "1.5M"),
        ("CACHE_MAX_BYTES", "0"),
        ("MAX_BODY_BYTES", "-5"),
        ("LOG_LEVEL", "loud"),
        ("CACHE_PER_KEY", "maybe"),
        ("OLLAMA_HOST", "http://127.0.0.1:11434/api"),
        ("OLLAMA_HOST", "ftp://127.0.0.1"),
        ("OLLAMA_HOST", "127.0.0.1:99999"),
        ("OLLAMA_HOST", "a host"),
        ("OLLAMA_HOST", "a..b"),
        ("OLLAMA_HOST", "x" * 70),
        ("OLLAMA_HOST", "host?x=1"),
        ("CACHE_TTL", "1h30m"),
        ("CACHE_TTL", "10M"),
        ("CACHE_TTL", "s"),
        ("CACHE_TTL", "1d"),
        ("CACHE_TTL", "infm"),
        ("CACHE_TTL", "999999h"),
        ("KEY_REFRESH", "0s"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(name: str, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        loaded(**{name: text})
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("ollama.example", "ollama.example", 11500),
        ("ollama.example:1234", "ollama.example", 1234),
        ("http://ollama.example:1234", "ollama.example", 1234),
        ("http://ollama.example:1234/", "ollama.example", 1234),
        ("http://ollama.example", "ollama.example", 11500),
        ("0.0.0.0", "127.0.0.1", 11500),
        ("0.0.0.0:1234", "127.0.0.1", 1234),
        (":1234", "127.0.0.1", 1234),
        ("::", "::1", 11500),
        ("[::]:1234", "::1", 1234),
        ("::1", "::1", 11500),
        ("http://[::1]:1234", "::1", 1234),
    ],
)
def test_ollama_host_is_written_as_for_ollama_itself(text: str, host: str, port: int) -> None:
    settings = loaded(OLLAMA_HOST=text, OLLAMA_PORT="11500")
    assert (settings.ollama_host, settings.ollama_port) == (host, port)


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert loaded(OLLAMA_HOST="::1").upstream_address == "[::1]:11434"


def test_an_answer_is_never_larger_than_the_budget() -> None:
    assert loaded(CACHE_MAX_BYTES="1M").cache_max_entry_bytes == 1 << 20


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text('\ufeffCACHE_TTL="7"\nKEY_REFRESH=3 # seconds\nAPI_KEY_SALT=a$HOME${x}\n')
    settings = load({"CACHE_TTL": "8"}, path)
    assert (settings.cache_ttl, settings.key_refresh) == (8, 3)
    assert settings.api_key_salt == "a$HOME${x}"


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"^\.env: "):
        load({}, path)


def test_the_salt_is_in_no_repr() -> None:
    assert "pepper" not in repr(loaded(API_KEY_SALT="pepper"))


def test_relative_key_files_start_at_the_programs_folder() -> None:
    here = Path(__file__).resolve().parent.parent
    assert loaded(API_KEY_FILE="keys/keys.txt").key_path == here / "keys/keys.txt"
    assert loaded(API_KEY_FILE="/srv/keys.txt").key_path == Path("/srv/keys.txt")


# Origins.

ALLOWED = [
    ("*", "https://chat.example"),
    ("*", "null"),
    ("https://chat.example", "https://chat.example"),
    ("https://Chat.Example", "https://chat.example"),
    ("https://chat.example:8443", "https://chat.example:8443"),
    ("http://a.example, https://b.example", "https://b.example"),
    ("https://*.example.com", "https://a.b.example.com"),
    ("*.example.com", "https://a.example.com"),
    ("https://*.example.com:*", "https://a.example.com:8443"),
    ("http://localhost:*", "http://localhost:3000"),
    ("http://[::1]:*", "http://[::1]:5173"),
    ("http://*", "http://localhost:3000"),
    ("chrome-extension://*", "chrome-extension://abcdefghijklmnop"),
    ("safari-web-extension://*", "safari-web-extension://E5FB5B4F-07B1-4F5B"),
    ("app://obsidian.md", "app://obsidian.md"),
    ("app://*", "app://obsidian.md"),
    ("file://*", "file://"),
]
REFUSED = [
    ("", "https://chat.example"),
    ("https://chat.example", "http://chat.example"),
    ("https://chat.example", "https://chat.example:8443"),
    ("https://chat.example", "https://chat.example.evil.example"),
    ("https://chat.example", "null"),
    ("https://*.example.com", "https://example.com"),
    ("https://*.example.com", "https://evilexample.com"),
    ("https://*.example.com", "https://a.example.com.evil.example"),
    ("https://*.example.com", "http://a.example.com"),
    ("https://*.example.com:*", "https://a.example.com"),
    ("https://a*b*c.example", "https://acb.example"),
    ("https://ab*ba.example", "https://aba.example"),
    ("http://localhost:*", "http://localhost"),
    ("chrome-extension://*", "moz-extension://abc"),
]


@pytest.mark.parametrize(("text", "origin"), ALLOWED)
def test_an_origin_that_matches_a_pattern_may_call(text: str, origin: str) -> None:
    assert Origins(loaded(CORS_ORIGINS=text).cors_origins).allow(origin.encode())


@pytest.mark.parametrize(("text", "origin"), REFUSED)
def test_an_origin_that_matches_no_pattern_may_not_call(text: str, origin: str) -> None:
    assert not Origins(loaded(CORS_ORIGINS=text).cors_origins).allow(origin.encode())


@pytest.mark.parametrize(
    "pattern",
    [
        "chat.example",
        "localhost:*",
        "https://",
        "https://:8443",
        "https://chat.example/",
        "https://*/chat",
        "https://user@chat.example",
        "https://chat.example:443",
        "http://chat.example:80",
        "https://chat.example:",
        "https://chat.example:0",
        "https://chat.example:08443",
        "https://chat.example:65536",
        "https://chat.example:http",
        "https://b\u00fccher.example",
        "https://chat.example https://b.example",
        "https://[::1",
        "http//*",
        "null",
    ],
)
def test_a_pattern_that_can_match_no_origin_is_named(pattern: str) -> None:
    with pytest.raises(SettingsError, match=r"^CORS_ORIGINS must be \* or origins") as caught:
        loaded(CORS_ORIGINS=f"https://good.example,{pattern}")
    assert str(caught.value).endswith(f"not {pattern!r}")


def test_matching_a_long_origin_does_not_backtrack() -> None:
    origins = Origins(("*a" * 20 + "*b",))  # a backtracking matcher would never end
    assert not origins.allow(b"a" * (16 << 10))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("CACHE_PERKEY", "CACHE_PER_KEY"),
        ("LISTEN_PRT", "LISTEN_PORT"),
        ("LOG_LEVLE", "LOG_LEVEL"),
        ("APIKEY_FILE", "API_KEY_FILE"),
        ("ADMIN_LABEL", "ADMIN_LABELS"),
        ("cache_ttl", "CACHE_TTL"),
    ],
)
def test_a_misspelt_setting_is_warned_about_with_the_right_spelling(
    wrong: str, right: str, tmp_path: Path
) -> None:
    (warning,) = loaded(**{wrong: "1"}).warnings
    assert warning == f"{wrong} is not a setting of OllProx: did you mean {right}?"
    path = tmp_path / ".env"
    path.write_text(f"{wrong}=1\n")
    assert load({}, path).warnings == (warning,)


OTHERS = """
    OLLAMA_DEBUG OLLAMA_FLASH_ATTENTION OLLAMA_GPU_OVERHEAD OLLAMA_HOST OLLAMA_KEEP_ALIVE
    OLLAMA_KV_CACHE_TYPE OLLAMA_LLM_LIBRARY OLLAMA_LOAD_TIMEOUT OLLAMA_MAX_LOADED_MODELS
    OLLAMA_MAX_QUEUE OLLAMA_MODELS OLLAMA_NOHISTORY OLLAMA_NOPRUNE OLLAMA_NUM_PARALLEL
    OLLAMA_ORIGINS OLLAMA_SCHED_SPREAD OLLAMA_CONTEXT_LENGTH OLLAMA_API_KEY OLLAMA_CA_CERT
    SSL_CERT_FILE SSL_CERT_DIR LISTEN_PID LISTEN_FDS LISTEN_FDNAMES LOGLEVEL LOGNAME API_KEY
    OPENAI_API_KEY CACHE_DIR XDG_CACHE_HOME MAX_JOBS PATH HOME TZ COMPOSE_PROJECT_NAME
    LS_COLORS LC_ALL TERM PORT HOST KEY_FILE TIMEOUT PYTHONPATH http_proxy
"""


def test_other_programs_variables_are_not_warned_about() -> None:
    assert loaded(**dict.fromkeys(OTHERS.split(), "1.2.3.4")).warnings == ()


# The names of models. Each row was tried on Ollama's own rules: internal/modelref, types/model.


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("", ""),
        ("  ", ""),
        ("llama2", "llama2:latest"),
        ("llama2:latest", "llama2:latest"),
        ("Llama2:7B", "llama2:7b"),
        (" llama2\n", "llama2:latest"),
        ("llama2:local", "llama2:latest"),
        ("llama2:7b:local", "llama2:7b"),
        ("llama2:7b:LOCAL", "llama2:7b"),
        ("llama2: local", "llama2:latest"),
        ("llama2:cloud", "llama2:cloud"),
        ("gpt-oss:20b:cloud", "gpt-oss:20b-cloud"),
        ("gpt-oss:20b-cloud", "gpt-oss:20b-cloud"),
        ("gpt-oss: 20b-Cloud", "gpt-oss:20b-cloud"),
        ("my-cloud", "my-cloud:latest"),
        ("a:b-cloud/c", "a:b-cloud/c:latest"),
        ("library/llama2", "llama2:latest"),
        ("registry.ollama.ai/library/llama2:7b", "llama2:7b"),
        ("Registry.Ollama.AI/Library/llama2", "llama2:latest"),
        ("registry.ollama.ai/me/llama2", "me/llama2:latest"),
        ("https://registry.ollama.ai/library/llama2", "llama2:latest"),
        ("http://hf.co/me/Llama2", "hf.co/me/llama2:latest"),
        ("me/llama2", "me/llama2:latest"),
        ("host:5000/me/llama2", "host:5000/me/llama2:latest"),
        ("host:5000/library/llama2", "host:5000/library/llama2:latest"),
        ("localhost:11434/library/foo:cloud", "localhost:11434/library/foo:cloud"),
        # What Ollama refuses does not become what it takes.
        ("llama2:cloud:local", "llama2:cloud:local"),
        ("llama2:local:local", "llama2:local:local"),
        ("llama2:", "llama2:"),
        ("/llama2", "/llama2:latest"),
        ("/library/llama2", "/library/llama2:latest"),
        ("library//llama2", "library//llama2:latest"),
        ("http://library/llama2", "http://library/llama2:latest"),
        ("registry.ollama.ai/llama2", "registry.ollama.ai/llama2:latest"),
        ("a/registry.ollama.ai/library/llama2", "a/registry.ollama.ai/library/llama2:latest"),
        ("\u212aimi", "\u212aimi:latest"),  # the Kelvin sign, whose lower case is k
    ],
)
def test_a_models_name_is_written_as_ollama_lists_it(name: str, listed: str) -> None:
    assert normalize_model(name) == listed
    assert normalize_model(listed) == listed
