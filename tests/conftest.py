"""Fixtures for all tests: the stand-in for Ollama, and OllProx as users run it."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import fields
from pathlib import Path

import hypothesis
import pytest
import pytest_asyncio

ROOT = Path(__file__).resolve().parent.parent
WINGS = ("access", "wire", "answers", "watch")
SOURCES = [*ROOT.glob("*.py"), *(file for wing in WINGS for file in (ROOT / wing).glob("*.py"))]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from client import KEY  # noqa: E402 - the path had to be set first
from standin import Script, StandIn  # noqa: E402

from settings import Settings  # noqa: E402

# No deadlines, since machines differ in speed; in CI, the same examples each time.
hypothesis.settings.register_profile(
    "ollprox", deadline=None, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("ollprox")

# What must never be in the log, whatever the input.
FAULTS = re.compile(r"Traceback|never retrieved|was destroyed|ResourceWarning|never awaited")


DEFAULTS = {item.name.upper(): "" for item in fields(Settings)}  # so that .env does not count


class Program:
    """`python ollprox.py` as a process."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log
        self.port = 0

    @property
    def pid(self) -> int:
        return self.process.pid

    def resident(self, field: str = "VmRSS") -> int:
        """Return its resident memory in bytes, or with VmHWM its peak."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return 1024 * int(status.split(f"{field}:")[1].split()[0])

    def text(self) -> str:
        return self.log.read_text()

    async def says(self, pattern: str) -> re.Match[str]:
        """Wait until the program has written text that matches the pattern."""
        while (match := re.search(pattern, self.text())) is None:
            if self.process.returncode is not None:
                raise AssertionError(f"it ended before it wrote {pattern!r}:\n{self.text()}")
            await asyncio.sleep(0.01)
        return match

    async def stop(self) -> int:
        if self.process.returncode is None:
            self.process.terminate()
        return await self.process.wait()


Start = Callable[..., Awaitable[Program]]


@pytest_asyncio.fixture
async def launch(tmp_path: Path, ollama: StandIn, key_file: Path) -> AsyncIterator[Start]:
    """Start OllProx with settings; at the test's end, stop it and search its log for bugs.

    By default it forwards to the stand-in and has the key file. `API_KEY_FILE=""` starts it
    without one. If its memory is `measured`, it runs without Python's development mode.
    """
    programs: list[Program] = []

    async def start(
        *arguments: str, fails: bool = False, measured: bool = False, **settings: object
    ) -> Program:
        log = tmp_path / f"ollprox-{len(programs)}.log"
        environ = {k: v for k, v in os.environ.items() if k in {"PATH", "HOME", "LANG"}}
        environ |= DEFAULTS
        environ |= {"LISTEN_HOST": "127.0.0.1", "LISTEN_PORT": "0", "PYTHONASYNCIODEBUG": "1"}
        environ |= {"API_KEY_FILE": str(key_file)}
        if "OLLAMA_HOST" not in settings:
            environ |= {"OLLAMA_PORT": str(ollama.port)}
        environ |= {name: str(value) for name, value in settings.items()}
        mode = [] if measured else ["-X", "dev"]
        if measured:
            del environ["PYTHONASYNCIODEBUG"]
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *mode, str(ROOT / "ollprox.py"), *arguments),
                env=environ,
                cwd=tmp_path,
                stdout=file,
                stderr=file,
            )
        program = Program(process, log)
        if not arguments and not fails:
            programs.append(program)
            program.port = int((await program.says(r"listens on https?://\S+:(\d+)"))[1])
        return program

    yield start
    for program in programs:
        killed = program.process.returncode not in {None, 0}
        assert await program.stop() == 0 or killed, program.text()
        assert not FAULTS.search(program.text()), program.text()


@pytest_asyncio.fixture
async def ollama() -> AsyncIterator[StandIn]:
    """A stand-in for Ollama, listening."""
    standin = StandIn(Script())
    standin.port = await standin.start()
    yield standin
    standin.script.let_go.set()
    await standin.stop()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """A key file with one key."""
    path = tmp_path / "tester-keys.txt"
    path.write_text(f"{KEY}  # tester\n")
    return path


@pytest_asyncio.fixture
async def ollprox(launch: Start) -> Program:
    """OllProx in front of the stand-in, with the default settings."""
    return await launch()
