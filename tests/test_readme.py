"""README and `docs/` are correct: every command and snippet runs, every table is compared."""

import ast
import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import pytest_asyncio
from client import KEY, ask, question
from conftest import ROOT, SOURCES, Program, Start
from standin import Script, StandIn

from answers.ollama_api import route_table
from settings import Settings
from watch.usage import Batch, Counts, UsageFile

README = (ROOT / "README.md").read_text()
NODE = Path(__file__).parent / "node"
TROUBLES = (ROOT / "docs/troubleshooting.md").read_text()
METRICS = (ROOT / "docs/metrics.md").read_text()
# All but deploying.md, whose commands are for root: what they lead to is tried in test_deploy.py;
# scaling.md, of which test_cluster.py and test_shared_cache.py try the files and the ACL;
# and install.md, whose commands need a network: test_install.py does without.
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if path.name not in {"deploying.md", "scaling.md", "install.md"}
}
MAX_WORDS = 1100  # of the README beside tables and code: five minutes


# What is in a page.


def blocks(language: str) -> list[pytest.param]:  # type: ignore[valid-type]  # a function
    """The blocks of a language in all pages."""
    return [
        pytest.param(code, id=f"{page}-{number}")
        for page, text in PAGES.items()
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL))
    ]


def commands(text: str) -> list[str]:
    """The commands in a page's indented blocks, and in its fenced ones that name no language."""
    lines, language = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language in {"", "sh"} or (language is None and line.startswith("    ")):
            lines.append(line if language is not None else line[4:])
    return [line for line in re.split(r"(?<!\\)\n", "\n".join(lines)) if line]


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without its own head."""
    after = text.partition(f"\n{heading}\n")[2]
    table = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE)
    assert table, heading
    lines = table[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# Commands and snippets.


@dataclass
class Reader:
    """A reader who has pasted all earlier commands into a copy of the checkout."""

    folder: Path
    ollama: StandIn
    launch: Start

    def environ(self, **more: object) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        path = f"{self.folder}/.venv/bin:{os.environ['PATH']}"
        return {**kept, "PATH": path, **{name: str(value) for name, value in more.items()}}

    async def run(self, command: str, **more: object) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", command),
            cwd=self.folder,
            env=self.environ(**more),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out = (await process.communicate())[0].decode()
        assert process.returncode is not None
        return process.returncode, out

    async def paste(self, command: str) -> str:
        status, out = await self.run(command)
        assert status == 0, out
        return out

    async def start(self, command: str, until: str, **more: object) -> tuple[str, str]:
        """Start a command that does not end by itself; stop it once its output matches.

        Returns:
            The match, and the complete output.

        """
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", f"exec {command}"),
            cwd=self.folder,
            env=self.environ(**more),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout
        text = ""
        try:
            while (match := re.search(until, text)) is None:
                line = await process.stdout.readline()
                assert line, text
                text += line.decode()
            return match[0], text
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
            await process.communicate()


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")


async def in_shell(reader: Reader, command: str, expected: str) -> None:
    """Paste a command; check its output and that of `--check` afterwards."""
    out = await reader.paste(command)
    _, check = await reader.run("python ollprox.py --check", LISTEN_HOST="127.0.0.1")
    assert re.search(expected, out + check), out + check


async def by_curl(reader: Reader, command: str, expected: str) -> None:
    """Send it to an OllProx with the key of the pages, whose label may do all."""
    need("curl")
    keys = reader.folder / "keys/garden.txt"
    keys.write_text(key_line())
    settings = {"OLLAMA_PORT": reader.ollama.port, "ADMIN_LABELS": "Mary"}
    settings["USAGE_FILE"] = reader.folder / "garden.db"
    port = (await reader.launch(**settings, API_KEY_FILE=keys)).port
    key = key_line().split()[0]
    await ask(port, "POST", "/call_model", question(), {"APIKEY": key})  # so that one is kept
    assert re.search(expected, await reader.paste(at(command, port)))


async def with_usage(reader: Reader, command: str, expected: str) -> None:
    """Paste it where a request has been counted."""
    batch = Batch()
    batch.row("2026-11-28", "Mary", "llama2").add(Counts(requests=3))
    UsageFile(reader.folder / "usage.db", 400).write(batch, 1_795_867_200.0)
    assert re.search(expected, await reader.paste(command))


async def by_make_run(reader: Reader, command: str, expected: str) -> None:
    """Start it, and paste the call that it prints."""
    need("make", "curl")
    settings = {"OLLAMA_PORT": reader.ollama.port, "LISTEN_PORT": 0, "LISTEN_HOST": "127.0.0.1"}
    call, text = await reader.start(command, r"curl http://.*\\\n.*\n", **settings)
    assert re.search(expected, text)
    key = re.search(r"APIKEY: (\S+)\"", call)
    assert key
    # The key went with that process, so here is another that has it.
    keys = reader.folder / "keys/made.txt"
    keys.write_text(key[1])
    port = (await reader.launch(OLLAMA_PORT=reader.ollama.port, API_KEY_FILE=keys)).port
    out = await reader.paste(re.sub(r"localhost:\d+", f"127.0.0.1:{port}", call))
    assert '"response":"Paris is the capital."' in out


async def by_make_demo(reader: Reader, command: str, expected: str) -> None:
    need("make", "bash", "curl")
    assert re.search(expected, await reader.paste(command), re.DOTALL)


async def by_compose(reader: Reader, command: str, expected: str) -> None:
    """Run it if Docker is installed; otherwise compare its names with `docker-compose.yml`."""
    services = compose_services()
    profile = re.search(r"--profile (\w+)", command)
    assert profile is None or profile[1] in services.values()
    if named := re.search(r" (?:exec|logs) (\w+)", command):
        assert named[1] in services
    if shutil.which("docker") is None or (await reader.run("docker compose version"))[0]:
        pytest.skip("needs docker compose: only the names of services and profiles were checked")
    await reader.run("cp -n .env.example .env")
    chosen = f"docker compose {profile[0] if profile else ''} config --services"
    assert set((await reader.paste(chosen)).split()) >= {
        name for name, only in services.items() if only in {"", profile and profile[1]}
    }
    if (await reader.run("docker info"))[0]:
        pytest.skip("needs Docker's daemon: only the services were checked")
    if command != "docker compose up":
        return  # its image is some gigabytes, or nothing runs to be asked
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (reader.folder / ".env").open("a") as file:
        file.write(f"LISTEN_HOST=127.0.0.1\nLISTEN_PORT={port}\nOLLAMA_PORT={reader.ollama.port}\n")
    project = {"COMPOSE_PROJECT_NAME": f"ollprox-test-{os.getpid()}"}
    try:
        status, out = await reader.run("docker compose build", **project)
        assert status == 0, out
        await reader.start(command, expected, **project)
    finally:
        await reader.run("docker compose down", **project)


async def by_git_clone(reader: Reader, command: str, expected: str) -> None:
    """Clone this checkout in place of the placeholder, and look at what is in the clone."""
    need("git")
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    assert "REPOSITORY_URL" in command
    command = command.replace("REPOSITORY_URL", str(ROOT))
    assert re.search(expected, await reader.paste(f"{command} && ls"))


async def by_start(reader: Reader, command: str, expected: str) -> None:
    """Start it, and stop it once it says what is expected."""
    settings = {"OLLAMA_PORT": reader.ollama.port, "LISTEN_PORT": 0, "LISTEN_HOST": "127.0.0.1"}
    await reader.start(command, expected, **settings)


async def in_test_install(reader: Reader, command: str, expected: str) -> None:
    """Leave it to another test, which does the same without a network."""
    assert f"def {expected}(" in (ROOT / "tests/test_install.py").read_text()


Way = Callable[[Reader, str, str], Awaitable[None]]

# How each command is tried, and what must come of it. Those `in_shell` are also what a later
# command of the same page finds done.
WAYS: dict[str, tuple[Way, str]] = {
    r"git clone REPOSITORY_URL ollprox && cd ollprox": (by_git_clone, r"(?m)^ollprox\.py$"),
    r"cp \.env\.example \.env": (in_shell, r"warn  keys +none \(API_KEY_FILE is not set\)"),
    r"echo 'secretgardenkey  # Mary' >> keys/keys\.txt": (in_shell, r"keys +1 from \S+/keys\.txt"),
    r"python ollprox\.py keys add --label Mary": (in_shell, r"added to(.|\n)*keys +2 from"),
    r"make ollprox\.pyz": (in_shell, "ok    settings"),
    r"python ollprox\.pyz": (by_start, r"OllProx \S+ listens on"),
    r"pipx install \.|ollprox": (in_test_install, "test_the_wheel_installs_runs_and_goes_away"),
    r"python keystore\.py new --label Mary": (in_shell, r"key file: \S{32,}  # Mary"),
    r"python keystore\.py add --label Bob .*": (in_shell, r"added to(.|\n)*keys +2 from"),
    r"python keystore\.py list": (in_shell, r"\nBob +rate=60/minute running=2\n"),
    r"python keystore\.py revoke Bob": (in_shell, r"1 line removed(.|\n)*keys +1 from"),
    # The salt is there, and the keys are plain yet.
    r'echo "API_KEY_SALT=.*" >> \.env': (
        in_shell,
        r"hash the file with `python ollprox\.py keys hash`",
    ),
    r"python keystore\.py hash < .* && mv .*": (in_shell, r"keys +1 from"),
    r"python ollprox\.py --check": (in_shell, r"ok    settings  listens on \S+, forwards to"),
    r"make run": (by_make_run, "No API key is set, so this one was made"),
    r"make demo": (by_make_demo, r"fwd=miss; stored.*Paris.*OllProx; hit.*Paris"),
    r"docker compose up": (by_compose, "Ollama .* answers at"),
    r"docker compose --profile ollama up -d": (by_compose, ""),
    r"docker compose exec ollama ollama pull llama2": (by_compose, ""),
    r"docker compose logs ollprox": (by_compose, ""),
    r"curl -X POST \S+/call_model .*": (by_curl, r'"response":"Paris is the capital\."'),
    r"curl -i \S+/call_model .*no-cache.*": (by_curl, r"OllProx; fwd=request; stored"),
    r"curl \S+/api/chat .*": (by_curl, r'"content":"Paris is the capital\."'),
    r"curl -N -i \S+/api/generate .*": (by_curl, r'fwd=miss(.|\n)*"response":"Paris"(.|\n)*\n\{'),
    r"curl -X DELETE \S+/cache\S* .*": (by_curl, r'\{"dropped":1\}'),
    r"curl \S+/metrics .*": (by_curl, r"\nollprox_keys 1\n"),
    r"curl \S+/whoami .*": (by_curl, r'\{"label":"Mary","rights":\{"admin":true\}'),
    r"curl \S+/metrics\.json .*": (by_curl, r'"rows_by_label":true'),
    r"curl \"\S+/usage\S* .*": (by_curl, r'\{"rows": \[\{"key": "Mary", "model": '),
    r"echo 'USAGE_FILE=usage\.db' >> \.env": (in_shell, "ok    settings"),
    r"python ollprox\.py --usage.*": (with_usage, r"key .* requests (.|\n)*Mary .* 3 "),
}


def way(command: str) -> tuple[Way, str]:
    """Return how to test a command; there must be a way for each."""
    found = [tried for form, tried in WAYS.items() if re.fullmatch(form, command, re.DOTALL)]
    assert len(found) == 1, f"how is this tested? {command!r}"
    return found[0]


COMMANDS = [
    pytest.param(page, number, id=f"{page}-{command[:40]}")
    for page, text in PAGES.items()
    for number, command in enumerate(commands(text))
]


@pytest_asyncio.fixture
async def reader(tmp_path: Path, ollama: StandIn, launch: Start) -> Reader:
    """A copy of the checkout, in which `make` finds its packages installed."""
    folder = tmp_path / "ollprox"
    left = shutil.ignore_patterns(".*", "node_modules", "traces", "__pycache__", "*.txt", "*.whl")
    shutil.copytree(ROOT, folder, ignore=left)
    for name in ("requirements.txt", ".env.example"):
        shutil.copy(ROOT / name, folder)
    binaries = folder / ".venv/bin"
    binaries.mkdir(parents=True)
    python = binaries / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / ".venv/run.stamp").touch()
    return Reader(folder, ollama, launch)


@pytest.mark.timeout(900)  # seconds: an image may have to be built
@pytest.mark.parametrize(("page", "number"), COMMANDS)
async def test_each_command_does_what_it_is_for(page: str, number: int, reader: Reader) -> None:
    *before, command = commands(PAGES[page])[: number + 1]
    for earlier in before:
        if way(earlier)[0] is in_shell:
            await reader.paste(earlier)
    tried, expected = way(command)
    await tried(reader, command, expected)


def test_a_command_that_no_test_knows_is_noticed() -> None:
    assert len(commands(README)) >= 10
    assert commands("    one \\\n      more\n\n```\ntwo\n```\n```js\nno\n```\n") == [
        "one \\\n  more",
        "two",
    ]
    with pytest.raises(AssertionError, match="how is this tested"):
        way("make coffee")
    known = {"", "sh", "text", "python", "js", "yaml", "ini", "mermaid"}  # each is handled here
    for page, text in PAGES.items():
        assert set(re.findall(r"^```(\w*)\n(?:.*\n)*?```$", text, re.MULTILINE)) <= known, page
    assert set(re.findall(r"^```(\w+)", README, re.MULTILINE)) <= {"sh", "python", "js"}


def compose_services() -> dict[str, str]:
    """The services of `docker-compose.yml`, each with its profile, if it has one."""
    text = (ROOT / "docker-compose.yml").read_text().partition("services:\n")[2]
    parts = re.split(r"^  (\w+):\n", re.split(r"^\w", text, flags=re.MULTILINE)[0], flags=re.M)[1:]
    profiles = (re.search(r"profiles: \[(\w+)\]", part) for part in parts[1::2])
    return dict(zip(parts[::2], (found[1] if found else "" for found in profiles), strict=True))


@pytest.mark.parametrize("code", blocks("yaml"))
async def test_each_override_fits_the_compose_file(code: str, reader: Reader) -> None:
    assert set(re.findall(r"^  (\w+):$", code, re.MULTILINE)) <= set(compose_services())
    (reader.folder / "docker-compose.override.yml").write_text(code)
    if shutil.which("docker") is None or (await reader.run("docker compose version"))[0]:
        pytest.skip("needs docker compose: only the services' names were checked")
    await reader.paste("cp .env.example .env")
    out = await reader.paste("docker compose config")
    assert "host.docker.internal" in out
    assert "network_mode" not in out


def key_line() -> str:
    line = re.search(r"echo '(secretgardenkey.*)' >> keys", README)
    assert line
    return line[1]


@pytest_asyncio.fixture
async def garden(launch: Start, tmp_path: Path) -> Program:
    """OllProx with the README's key."""
    keys = tmp_path / "garden.txt"
    keys.write_text(key_line())
    return await launch(API_KEY_FILE=keys)


def at(text: str, port: int) -> str:
    assert "localhost:8000" in text
    return text.replace("localhost:8000", f"127.0.0.1:{port}")


async def run(*command: str, cwd: Path | None = None) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out = (await process.communicate())[0].decode()
    assert process.returncode == 0, out
    return out


@pytest.mark.parametrize("code", blocks("python"))
async def test_each_python_snippet_works(garden: Program, code: str) -> None:
    out = await run(sys.executable, "-c", at(code, garden.port), cwd=ROOT)
    assert "Paris is the capital." in out


@pytest.mark.skipif(
    shutil.which("node") is None or not (NODE / "node_modules").exists(),
    reason="needs Node and `npm ci --prefix tests/node`",
)
@pytest.mark.parametrize("code", blocks("js"))
async def test_each_javascript_snippet_works(garden: Program, code: str) -> None:
    out = await run("node", "--input-type=module", "-e", at(code, garden.port), cwd=NODE)
    assert "Paris is the capital." in out


# Tables.


def test_every_setting_is_in_the_table_with_its_default() -> None:
    table = rows(README, "## Settings")
    for item in (item for item in fields(Settings) if item.metadata):
        name = item.name.upper()
        found = [row for row in table if name in names(row[0])]
        assert len(found) == 1, name
        shown = found[0][2].strip("`")
        empty: object = "" if isinstance(item.default, str) else ()
        default = empty if shown == "none" else item.metadata["parse"](shown)
        assert default == item.default, name


def test_every_setting_is_in_the_example_with_its_default() -> None:
    example = (ROOT / ".env.example").read_text()
    for item in (item for item in fields(Settings) if item.metadata):
        match = re.search(rf"^#{item.name.upper()}=(.*)$", example, re.MULTILINE)
        assert match, item.name
        if match[1] and item.name != "api_key_file":
            assert item.metadata["parse"](match[1]) == item.default, item.name
    active = [line for line in example.splitlines() if line and not line.startswith("#")]
    assert active == []  # as copied, nothing is set


def test_every_setting_is_explained() -> None:
    explained = re.findall(r"^- ((?:`[A-Z_]+`(?:, )?)+):", PAGES["docs/settings.md"], re.MULTILINE)
    found = [name for item in explained for name in names(item)]
    assert sorted(found) == sorted(f.name.upper() for f in fields(Settings) if f.metadata)


def test_every_path_is_in_the_readme() -> None:
    for path in route_table(1).rows:
        name = path.decode().removeprefix("/api/").rstrip("/")
        assert name in README, path


async def test_every_metric_is_in_the_table(launch: Start, ollama: StandIn, tmp_path: Path) -> None:
    other = StandIn(Script(models={"llama2:latest": "b" * 64}))  # so that there is a conflict
    hosts = f"127.0.0.1:{ollama.port},127.0.0.1:{await other.start()}"
    ollprox = await launch(
        OLLAMA_HOST=hosts,
        USAGE_FILE=tmp_path / "usage.db",
        CACHE_URL="valkey://127.0.0.1:1",  # where nothing listens
        CACHE_SECRET="a secret for this test",
    )
    await ask(ollprox.port, "POST", "/call_model", question())
    await ask(ollprox.port, "GET", "/health")
    text = (await ask(ollprox.port, "GET", "/metrics")).body.decode()
    await other.stop()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    table = {names(row[0])[0]: row for row in rows(METRICS, "## Metrics")}
    assert {name: row[1] for name, row in table.items()} == kinds
    for name, row in table.items():
        if name == "ollprox_upstream_digest_conflict":
            continue  # it needs several Ollama servers
        samples = re.findall(rf"^{name}(?:_bucket)?(?:{{(.*)}})? ", text, re.MULTILINE)
        assert samples, name
        labels = {label for sample in samples for label in re.findall(r'(\w+)="', sample)}
        assert labels == set(names(row[2])), name


async def test_every_field_of_the_log_is_in_the_table(launch: Start) -> None:
    documented = [names(row[0])[0] for row in rows(METRICS, "## The log")]
    ollprox = await launch()
    await ask(ollprox.port, "POST", "/call_model", question())
    line = (await ollprox.says(r"\n\S+ access (.*)\n"))[1]
    assert re.findall(r"(\w+)=", line) == documented
    example = re.search(r"^\d\S+Z access (.*)$", METRICS, re.MULTILINE)
    assert example
    assert re.findall(r"(\w+)=", example[1]) == documented
    ollprox = await launch(LOG_FORMAT="json")
    await ask(ollprox.port, "POST", "/call_model", question())
    line = (await ollprox.says(r'\n(\{.*"message": "access".*\})\n'))[1]
    assert list(json.loads(line)) == ["time", "level", "message", *documented]
    assert KEY not in ollprox.text()


# Errors.

SAID = {"HTTPError", "BadHead", "SettingsError", "failure", "complain", "append"}
LOGGED = {"warning", "error", "exception"}
FILLED_IN_FROM = {"what", "wrong", "reason"}  # names of texts that become a part of an error


def fixed(node: ast.expr | None) -> list[str]:
    """The texts in an expression, cut at what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.split(r"%\w", node.value)
    if isinstance(node, ast.JoinedStr):
        return [text for value in node.values for text in fixed(value)]
    if isinstance(node, ast.IfExp):
        return fixed(node.body) + fixed(node.orelse)
    if isinstance(node, ast.Tuple):
        return [text for item in node.elts for text in fixed(item)]
    return []


def errors(path: Path) -> Iterator[list[str]]:
    """The fixed texts of each error in a module, and of each line of the log from WARNING on."""
    heard = (
        SAID | LOGGED | ({"ValueError"} if path.name in {"settings.py", "startup.py"} else set())
    )
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in heard:
                yield from (fixed(argument) for argument in node.args)
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in FILLED_IN_FROM:
            yield from ([text] for text in fixed(node.value))
        elif isinstance(node, ast.Yield) and path.name == "keystore.py":
            yield fixed(node.value)
        elif isinstance(node, ast.FunctionDef) and node.name in {"_fix", "close"}:
            yield from (fixed(r.value) for r in ast.walk(node) if isinstance(r, ast.Return))


def test_every_error_is_explained() -> None:
    """Each error's first words are in the page; the failure lists all that are missing."""
    page = " ".join(TROUBLES.replace("`", "").split())
    count, missing = 0, []
    for path in sorted(SOURCES):
        for texts in errors(path):
            said = [text for text in texts if len(re.findall(r"[A-Za-z]{2,}", text)) > 1]
            for text in said[:1]:  # its first part is enough to find it by
                first = " ".join(text.replace("`", "").split()[:6])
                missing += [] if first in page else [f"{path.name}: {text!r}"]
                count += 1
    assert not missing, "not in docs/troubleshooting.md:\n" + "\n".join(missing)
    assert count > 90  # or the search has lost its way


def test_every_status_is_in_the_readme() -> None:
    shown = {row[0] for row in rows(README, "## Errors")}
    raised = {
        status
        for path in SOURCES
        for status in re.findall(r"(?:HTTPError|BadHead)\(\s*(\d{3})", path.read_text())
    }
    assert raised <= shown


# The whole.


def test_the_readme_is_read_in_five_minutes() -> None:
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "    "))]
    assert sum(len(line.split()) for line in prose) <= MAX_WORDS


def anchors(text: str) -> set[str]:
    """What GitHub names a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere() -> None:
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text()):
            name, _, anchor = target.partition("#")
            other = (path.parent / name) if name else path
            assert other.exists(), (path.name, target)
            assert not anchor or anchor in anchors(other.read_text()), (path.name, target)


def test_every_module_is_on_the_map() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    shown = {names(row[0])[0] for row in rows(contributing, "## The map")}
    modules = {str(path.relative_to(ROOT)) for path in SOURCES if path.name != "__init__.py"}
    assert shown == {*modules, "watch/dashboard.html"}
