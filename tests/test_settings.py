from dataclasses import fields
from pathlib import Path

import pytest

from settings import Settings, SettingsError, load, normalize_model

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
        ("OLLAMA_HOST", "http://u:p@127.0.0.1"),
        ("OLLAMA_HOST", "ftp://127.0.0.1"),
        ("OLLAMA_HOST", "127.0.0.1:99999"),
        ("OLLAMA_HOST", "a host"),
        ("OLLAMA_HOST", "a..b"),
        ("OLLAMA_HOST", "x" * 70),
        ("OLLAMA_HOST", "host?x=1"),
        ("OLLAMA_HOST", "127.0.0.1:8000"),
        ("OLLAMA_HOST", "localhost:8000"),
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
