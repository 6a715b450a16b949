"""The ways to install OllProx, and the systems it runs on.

These tests use no tools of Unix, so that CI runs them on Windows and macOS too.
"""

import asyncio
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from client import KEY, Client, ask, question
from conftest import FAULTS, ROOT, SOURCES
from standin import StandIn

import ollprox
import startup
from access import keytool
from settings import load

ELSEWHERE = ROOT / "tests/elsewhere"
KEPT = {"PATH", "HOME", "LANG", "SYSTEMROOT", "TEMP", "USERPROFILE"}
STOP = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT)  # what Ctrl-C leads to
# A group of its own, so that the tests do not get its Ctrl-Break.
GROUP: int = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
BIN = "Scripts" if os.name == "nt" else "bin"
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "ollprox.py").read_text())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def environ(**settings: object) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.upper() in KEPT}
    return {**kept, **{name: str(value) for name, value in settings.items()}}


def run(*command: object, cwd: Path, status: int = 0, **settings: object) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environ(**settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


class Running:
    """OllProx as a process, and what it has said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.port = 0
        self.text = ""

    async def says(self, pattern: str) -> re.Match[str]:
        assert self.process.stdout
        while (match := re.search(pattern, self.text)) is None:
            line = await self.process.stdout.readline()
            assert line, self.text
            self.text += line.decode()
        return match

    async def stop(self) -> int:
        self.process.send_signal(STOP)
        assert self.process.stdout
        self.text += (await self.process.stdout.read()).decode()
        return await self.process.wait()


@asynccontextmanager
async def running(*command: object, cwd: Path, **settings: object) -> AsyncIterator[Running]:
    """Start OllProx by a command, and stop it at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        cwd=cwd,
        env=environ(LISTEN_HOST="127.0.0.1", PYTHONUNBUFFERED=1, **settings),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        creationflags=GROUP,
    )
    ollprox = Running(process)
    try:
        ollprox.port = int((await ollprox.says(r"listens on http://\S+:(\d+)"))[1])
        yield ollprox
    finally:
        if process.returncode is None:
            await ollprox.stop()
    assert not FAULTS.search(ollprox.text), ollprox.text


async def answers(ollprox: Running, key: str) -> None:
    """Ask the same twice, and look at the dashboard."""
    for outcome in ("fwd=miss", "hit"):
        answer = await ask(ollprox.port, "POST", "/call_model", question(), {"APIKEY": key})
        assert answer.json()["response"] == "Paris is the capital."
        assert outcome in answer.cache_status
    page = await ask(ollprox.port, "GET", "/dashboard", headers={"APIKEY": ""})
    assert page.body.startswith(b"<!DOCTYPE html>")


# One file.


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pyz")
    run(sys.executable, ROOT / "deploy/install/make_pyz.py", folder / "ollprox.pyz", cwd=folder)
    return folder / "ollprox.pyz"


def test_the_zip_application_is_the_same_from_another_checkout(pyz: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    for file in (
        *SOURCES,
        ROOT / "watch/dashboard.html",
        ROOT / "LICENSE",
        ROOT / "pyproject.toml",
    ):
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
        copy.chmod(0o600)
        os.utime(copy, (1e9, 1e9))
    (tmp_path / "wire/__pycache__").mkdir()
    (tmp_path / "wire/__pycache__/server.pyc").touch()
    run(sys.executable, tmp_path / "deploy/install/make_pyz.py", "again.pyz", cwd=tmp_path)
    assert (tmp_path / "again.pyz").read_bytes() == pyz.read_bytes()


def test_the_zip_application_holds_what_it_needs(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as archive:
        found = archive.namelist()
        assert archive.testzip() is None
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert found == sorted(found)
    assert {file.relative_to(ROOT).as_posix() for file in SOURCES} <= set(found)
    assert {"watch/dashboard.html", "LICENSE", "h11/__init__.py", "dotenv/parser.py"} <= set(found)
    assert sum("licenses/" in name for name in found) == 2  # those of the dependencies
    assert not [name for name in found if "test" in name or name.endswith(".pyc")]
    assert os.access(pyz, os.X_OK)


async def test_the_zip_application_needs_only_python(
    pyz: Path, tmp_path: Path, ollama: StandIn
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    file = shutil.copy(pyz, home)
    (home / ".env").write_text(f"LISTEN_PORT=0\nOLLAMA_PORT={ollama.port}\nAPI_KEY_FILE=mine.txt\n")
    (home / "mine.txt").write_text(f"{KEY}  # Mary\n")
    bare = (sys.executable, "-I", "-S", file)  # without any installed package
    async with running(*bare, cwd=away) as ollprox:
        assert f"1 from {home / 'mine.txt'}" in (await ollprox.says(r"API keys .*\n"))[0]
        await answers(ollprox, KEY)
    assert [*away.iterdir()] == []
    assert "\nMary" in f"\n{run(*bare, 'keys', 'list', cwd=away)}"


# pip.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("hatchling") is None:
        pytest.skip("needs hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", folder, ROOT, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_has_everything_in_one_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"ollprox-{version()}.dist-info/METADATA").decode()
    own = {f"ollprox/{file.relative_to(ROOT).as_posix()}" for file in SOURCES}
    extra = {f"ollprox/{name}" for name in ("__init__.py", "__main__.py", "watch/dashboard.html")}
    assert found == own | extra
    for need in ("h11", "python-dotenv", "redis"):
        assert f"Requires-Dist: {need}" in metadata
    assert "Provides-Extra: shared" in metadata


async def test_the_wheel_installs_runs_and_goes_away(
    wheel: Path, tmp_path: Path, ollama: StandIn
) -> None:
    venv, work = tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    before = files(venv)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", venv)
    run(*pip, "install", "-q", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    # The dependencies as a user's pip would install them; a test has no network.
    for name in ("h11", "dotenv"):
        package = Path(
            str(distribution({"dotenv": "python-dotenv"}.get(name, name)).locate_file(""))
        )
        shutil.copytree(package / name, tmp_path / "needs" / name)
    needs: dict[str, Any] = {"PYTHONPATH": tmp_path / "needs", "PYTHONDONTWRITEBYTECODE": 1}
    commands = venv / BIN
    made = run(commands / "ollprox-keys", "add", "--label", "Mary", cwd=work, **needs)
    assert (work / "keys/keys.txt").exists()
    (work / ".env").write_text(f"LISTEN_PORT=0\nOLLAMA_PORT={ollama.port}\n")
    async with running(commands / "ollprox", cwd=work, **needs) as ollprox:
        await answers(ollprox, made.split("user: ")[1].split()[0])
    python = next(commands.glob("python*"))
    assert run(python, "-m", "ollprox", "keys", "list", cwd=work, **needs) == "Mary\n"
    for name in ("cache", "server", "settings", "wire"):
        run(python, "-c", f"import {name}", cwd=work, status=1, **needs)
    run(*pip, "uninstall", "-q", "-y", "ollprox", cwd=tmp_path)
    assert files(venv) == before


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def version() -> str:
    assert VERSION
    return VERSION[1]


# What is built, and from what.


def test_the_version_stands_in_one_place() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in pyproject
    assert f'"{version()}"' not in pyproject
    newest = re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == version()


def test_the_packages_of_the_wheel_are_those_that_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["shared"]
    for name, needs in (("requirements", project["dependencies"]), ("requirements-shared", extra)):
        file = ROOT / f"{name}.in"
        if name == "requirements" or file.exists():
            lines = file.read_text().splitlines()
            assert [line for line in lines if not line.startswith("#")] == needs


def test_the_image_has_every_module() -> None:
    patterns = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for file in (*SOURCES, ROOT / "watch/dashboard.html", ROOT / "requirements.txt"):
        name = file.relative_to(ROOT)
        fits = [p for p in patterns if name.match(p) and p.count("/") == len(name.parts) - 1]
        assert fits, name


def test_each_action_is_pinned_by_its_commit() -> None:
    workflows = [*(ROOT / ".github/workflows").glob("*.yml")]
    used = re.findall(r"uses: (.*)", "".join(file.read_text() for file in workflows))
    assert len(used) > 5
    for line in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_the_workflows_have_no_fault() -> None:
    beside = Path(sys.executable).parent
    actionlint = shutil.which("actionlint", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if actionlint is None:
        pytest.skip("needs actionlint")
    run(actionlint, *(ROOT / ".github/workflows").glob("*.yml"), cwd=ROOT)


@pytest.mark.skipif(os.name == "nt", reason="needs bash")
def test_the_release_is_refused_for_another_tag(tmp_path: Path) -> None:
    command = ("bash", ROOT / ".ci/release", tmp_path)
    out = run(*command, cwd=tmp_path, status=1, TAG="v9.9.9", PYTHON=sys.executable)
    assert f"the tag is v9.9.9, but ollprox.py says {version()}" in out


@pytest.mark.skipif(os.name == "nt", reason="needs bash")
def test_a_release_has_its_files_and_its_notes(tmp_path: Path, pyz: Path) -> None:
    if find_spec("hatchling") is None or find_spec("build") is None or not (ROOT / ".git").exists():
        pytest.skip("needs hatchling, build and a git checkout")
    command = ("bash", ROOT / ".ci/release", tmp_path)
    run(*command, cwd=tmp_path, TAG=f"v{version()}", PYTHON=sys.executable)
    built = {f"ollprox-{version()}{end}" for end in ("-py3-none-any.whl", ".tar.gz")}
    built.add("ollprox.pyz")
    assert {file.name for file in tmp_path.iterdir()} == {*built, "NOTES.md", "SHA256SUMS"}
    sums = (tmp_path / "SHA256SUMS").read_text()
    assert f"{hashlib.sha256(pyz.read_bytes()).hexdigest()}  ollprox.pyz\n" in sums
    notes = (tmp_path / "NOTES.md").read_text()
    assert "### Added" in notes
    assert "\n## " not in notes


# Systems that lack what Unix has.


@contextmanager
def checkout(folder: Path) -> Iterator[Path]:
    """A copy of the program, so that its `.env` and `keys/` are those of a test."""
    for file in (*SOURCES, ROOT / "watch/dashboard.html"):
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    yield folder


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "program"
    folder.mkdir()
    with checkout(folder) as copy:
        yield copy / "ollprox.py"


def lacking(ollama: StandIn) -> dict[str, Any]:
    """Settings for a process that lacks what Windows lacks."""
    return {"PYTHONPATH": ELSEWHERE, "OLLAMA_PORT": ollama.port, "LISTEN_PORT": 0}


def test_the_other_system_lacks_them(tmp_path: Path) -> None:
    text = "import os; assert not hasattr(os, 'getuid'); import fcntl"
    out = run(sys.executable, "-c", text, cwd=tmp_path, status=1, PYTHONPATH=ELSEWHERE)
    assert "ModuleNotFoundError: import of fcntl halted" in out
    text = "import asyncio; asyncio.SelectorEventLoop().add_signal_handler(2, print)"
    out = run(sys.executable, "-c", text, cwd=tmp_path, status=1, PYTHONPATH=ELSEWHERE)
    assert "NotImplementedError" in out


async def test_it_runs_where_unix_is_missing(program: Path, ollama: StandIn) -> None:
    settings: dict[str, Any] = {
        "PYTHONPATH": ELSEWHERE,
        "OLLAMA_PORT": ollama.port,
        "LISTEN_PORT": 0,
    }
    command = (sys.executable, "-X", "dev", program)
    made = run(*command, "keys", "add", "--label", "Mary", cwd=program.parent, **settings)
    key = made.split("user: ")[1].split()[0]
    assert "FAIL" not in run(*command, "--check", cwd=program.parent, **settings)
    async with running(*command, cwd=program.parent, **settings) as ollprox:
        await answers(ollprox, key)
        metrics = await ask(ollprox.port, "GET", "/metrics", headers={"APIKEY": key})
        assert metrics.status == 200
        assert b"\nprocess_cpu_seconds_total " in metrics.body


def elsewhere(
    program: Path, ollama: StandIn, key_file: Path
) -> AbstractAsyncContextManager[Running]:
    """Run `program` where Unix is missing."""
    settings: dict[str, Any] = {
        "PYTHONPATH": ELSEWHERE,
        "OLLAMA_PORT": ollama.port,
        "LISTEN_PORT": 0,
        "API_KEY_FILE": key_file,
    }
    command = (sys.executable, "-X", "dev", program)
    return running(*command, cwd=program.parent, **settings)


async def test_ctrl_c_drains_where_the_loop_takes_no_signals(
    program: Path, ollama: StandIn, key_file: Path
) -> None:
    async with elsewhere(program, ollama, key_file) as ollprox:
        async with Client(ollprox.port) as client:
            ollama.script.hold_before = 1
            answer = await client.begin("POST", "/api/generate", question())
            ollprox.process.send_signal(STOP)
            await ollprox.says("stopping: 1 clients have")
            ollama.script.let_go.set()
            await client.rest(answer)
            assert answer.complete
        assert await ollprox.process.wait() == 0


async def test_a_second_ctrl_c_ends_at_once_there_too(
    program: Path, ollama: StandIn, key_file: Path
) -> None:
    async with elsewhere(program, ollama, key_file) as ollprox:
        async with Client(ollprox.port) as client:
            ollama.script.hold_before = 1
            await client.begin("POST", "/api/generate", question())
            ollprox.process.send_signal(STOP)
            await ollprox.says("stopping: 1 clients have")
            assert await ollprox.stop() == 0
        ollama.script.let_go.set()


@pytest.mark.parametrize("path", ["", ELSEWHERE], ids=["here", "elsewhere"])
def test_keys_added_at_the_same_time_are_all_kept(program: Path, path: object) -> None:
    def add(number: int) -> None:
        command = (sys.executable, program, "keys", "add", "--label", f"user-{number}")
        run(*command, cwd=program.parent, PYTHONPATH=path)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = program.parent / "keys"
    assert len((keys / "keys.txt").read_text().splitlines()) == 6
    assert [file.name for file in keys.iterdir()] == ["keys.txt"]
    run(sys.executable, program, "keys", "revoke", "user-3", cwd=program.parent, PYTHONPATH=path)
    assert "user-3" not in (keys / "keys.txt").read_text()


def test_a_lock_that_is_left_behind_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keytool, "fcntl", None)
    monkeypatch.setattr(keytool, "MAX_LOCKED", 0.2)
    lock = tmp_path / ".keys.lock"
    lock.touch()
    with pytest.raises(OSError, match=f"if none is, remove {re.escape(str(lock))}"):
        keytool.change_file(tmp_path / "keys.txt", lambda text: b"one\n")
    lock.unlink()
    keytool.change_file(tmp_path / "keys.txt", lambda text: b"one\n")
    assert [file.name for file in tmp_path.iterdir()] == ["keys.txt"]


def test_a_key_file_that_is_just_being_read_is_replaced_a_moment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, refused = os.replace, [True, True, False]

    def as_on_windows(source: str, target: Path) -> None:
        if refused.pop(0):
            raise PermissionError(13, "The process cannot access the file")
        replace(source, target)

    monkeypatch.setattr(os, "replace", as_on_windows)
    keytool.change_file(tmp_path / "keys.txt", lambda text: b"one\n")
    assert (tmp_path / "keys.txt").read_bytes() == b"one\n"
    assert refused == []


# The key file that is there.


async def test_a_key_that_was_made_is_valid_without_a_setting(
    program: Path, ollama: StandIn
) -> None:
    made = run(sys.executable, program, "keys", "add", cwd=program.parent)
    assert str(program.parent / "keys/keys.txt") in made
    settings = {"OLLAMA_PORT": ollama.port, "LISTEN_PORT": 0}
    async with running(sys.executable, program, cwd=program.parent, **settings) as ollprox:
        assert re.search(r"1 from .*keys\.txt", (await ollprox.says(r"API keys .*\n"))[0])
        await answers(ollprox, made.split("user: ")[1].split()[0])
        assert "this one was made" not in ollprox.text


# --check.


def report(program: Path, status: int = 0, **settings: object) -> dict[str, list[str]]:
    """What `--check` reports: `MARK TEXT` by subject."""
    out = run(sys.executable, program, "--check", cwd=program.parent, status=status, **settings)
    found: dict[str, list[str]] = {}
    for line in out.splitlines():
        match = re.fullmatch(r"(ok  |warn|FAIL)  (\w+) +(.+)", line)
        assert match, line
        found.setdefault(match[2], []).append(f"{match[1].strip()} {match[3]}")
    return found


async def test_check_has_a_mark_for_each_line(
    program: Path, ollama: StandIn, key_file: Path
) -> None:
    ask_it = partial(report, program, OLLAMA_PORT=ollama.port, API_KEY_FILE=key_file)
    found = await asyncio.to_thread(ask_it)
    assert found["keys"] == [f"ok 1 from {key_file}"]
    assert re.fullmatch(r"ok \S+ answers at 127\.0\.0\.1:\d+", found["Ollama"][0])
    assert re.fullmatch(r"ok \d+: .*llama2:latest.*", found["models"][0])
    assert found["TLS"] == ["ok off (TLS_CERT_FILE is not set)"]
    assert {*found} == {"settings", "keys", "Ollama", "models", "TLS", "limits"}


def test_check_passes_while_ollama_is_down_and_says_what_to_do(
    program: Path, key_file: Path
) -> None:
    found = report(program, OLLAMA_PORT=free_port(), API_KEY_FILE=key_file)
    assert found["Ollama"][0].startswith("warn does not answer yet")
    assert "ollama serve" in found["Ollama"][0]
    assert "models" not in found


def test_check_fails_for_a_setting_that_is_wrong(program: Path, key_file: Path) -> None:
    found = report(program, 2, LISTEN_PORT="x")
    assert found["settings"][0].startswith("FAIL LISTEN_PORT must be a port")
    found = report(program, 2, API_KEY_FILE="/nope/keys.txt", OLLAMA_PORT=free_port())
    assert found["keys"][0].startswith("FAIL API_KEY_FILE: ")
    assert found["limits"]  # the rest is checked all the same


def test_check_warns_of_what_the_start_would_warn_of(program: Path, key_file: Path) -> None:
    key_file.write_text("short\n")
    bad = {"LOG_LEVLE": "x", "CACHE_MAX_BYTES": "900000G", "OLLAMA_PORT": str(free_port())}
    found = report(program, 0, API_KEY_FILE=key_file, **bad)
    assert (
        found["settings"][0]
        == "warn LOG_LEVLE is not a setting of OllProx: did you mean LOG_LEVEL?"
    )
    assert found["keys"][0].startswith("warn API_KEY_FILE line 1 has a key shorter")
    assert any("CACHE_MAX_BYTES is more than half" in line for line in found["limits"])


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
@pytest.mark.parametrize(("days", "mark"), [("30", "ok "), ("-1", "warn ")])
def test_check_says_how_long_the_certificate_is_valid(
    program: Path, tmp_path: Path, days: str, mark: str
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    form = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    asked = ("-keyout", key, "-out", tmp_path / "asked.pem", "-subj", "/CN=ollprox.example")
    run("openssl", "req", "-new", *form, *asked, cwd=tmp_path)
    signed = ("-in", tmp_path / "asked.pem", "-signkey", key, "-days", days, "-out", cert)
    run("openssl", "x509", "-req", *signed, cwd=tmp_path)
    found = report(program, TLS_CERT_FILE=cert, TLS_KEY_FILE=key, OLLAMA_PORT=free_port())
    (line,) = found["TLS"]
    assert line.startswith(mark)
    assert "expired" in line if mark == "warn " else re.search(r"valid until .* 20\d\d GMT", line)


# The first minutes.


async def test_the_start_names_the_dashboard(program: Path, ollama: StandIn) -> None:
    settings = {"OLLAMA_PORT": ollama.port, "LISTEN_PORT": 0}
    async with running(sys.executable, program, cwd=program.parent, **settings) as ollprox:
        url = (await ollprox.says(r"dashboard +(http://localhost:(\d+)/dashboard)\n"))[2]
        assert int(url) == ollprox.port
        await ollprox.says(r"To make a lasting one: python ollprox\.py keys add")


HTML = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


async def test_a_browser_at_the_root_is_led_to_the_dashboard(
    program: Path, ollama: StandIn, key_file: Path
) -> None:
    settings = {"OLLAMA_PORT": ollama.port, "LISTEN_PORT": 0, "API_KEY_FILE": key_file}
    async with running(sys.executable, program, cwd=program.parent, **settings) as ollprox:
        for key in ("", KEY, "wrong"):
            headers = {"APIKEY": key, "Accept": HTML}
            answer = await ask(ollprox.port, "GET", "/", headers=headers)
            assert (answer.status, answer.headers["location"]) == (302, "/dashboard")
        assert ollama.asked("/") == []
        for method, accept in (("GET", "*/*"), ("GET", "application/json"), ("HEAD", HTML)):
            headers = {"APIKEY": "", "Accept": accept}
            assert (await ask(ollprox.port, method, "/", headers=headers)).status == 401
        answer = await ask(ollprox.port, "GET", "/", headers={"APIKEY": KEY, "Accept": "*/*"})
        assert answer.body == b"Ollama is running"
        answer = await ask(ollprox.port, "GET", "/api/tags", headers={"APIKEY": "", "Accept": HTML})
        assert answer.status == 401


# In a container.


async def test_ollama_is_looked_for_on_the_containers_host(ollama: StandIn) -> None:
    nowhere = Path("/nonexistent/.env")
    down, up = load({"OLLAMA_PORT": str(free_port())}, nowhere), {"OLLAMA_PORT": str(ollama.port)}
    find = startup.host_of_container
    assert await asyncio.to_thread(find, down, "localhost") == "localhost"
    assert await asyncio.to_thread(find, down, "no-such-host.invalid") is None
    assert await asyncio.to_thread(find, load(up, nowhere), "localhost") is None
    other = load({"OLLAMA_HOST": "192.0.2.1"}, nowhere)
    assert await asyncio.to_thread(find, other, "localhost") is None


def test_check_says_that_the_containers_host_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key_file: Path
) -> None:
    for name, value in {"API_KEY_FILE": key_file, "OLLAMA_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(startup, "in_our_container", lambda: True)
    monkeypatch.setattr(startup, "host_of_container", lambda settings: "localhost")
    assert ollprox.main(["--check"]) == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("ok    settings  No Ollama at 127.0.0.1:")
    assert first.endswith("in this container: trying localhost")
    assert "forwards to http://localhost:" in second
    assert all(re.match(r"(ok  |warn|FAIL)  \w+ ", line) for line in rest)


def test_the_image_runs_the_key_tool_as_its_argument() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["python", "/app/ollprox.py"]' in dockerfile
    assert "\nCMD" not in dockerfile
    assert "EXPOSE 8000" in dockerfile
