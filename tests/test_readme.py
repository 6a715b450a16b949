"""What the README says is so."""

import asyncio
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import pytest_asyncio
from conftest import ROOT, Program, Start
from standin import StandIn

from ollama_api import route_table
from settings import Settings

README = (ROOT / "README.md").read_text()
NODE = Path(__file__).parent / "node"


@pytest_asyncio.fixture
async def garden(launch: Start, ollama: StandIn, tmp_path: Path) -> Program:
    """OllProx with the README's key."""
    keys = tmp_path / "garden.txt"
    line = re.search(r"echo '(secretgardenkey.*)' >> keys", README)
    assert line
    keys.write_text(line[1])
    return await launch(OLLAMA_PORT=ollama.port, API_KEY_FILE=keys)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


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


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_the_first_call_works_when_pasted(garden: Program) -> None:
    call = re.search(r"    (curl -X POST.*?\}')\n", README, re.DOTALL)
    assert call
    out = await run("sh", "-c", at(call[1], garden.port))
    assert '"response":"Paris is the capital."' in out


@pytest.mark.parametrize("number", range(len(blocks("python"))))
async def test_each_python_snippet_works(garden: Program, number: int, tmp_path: Path) -> None:
    code = at(blocks("python")[number], garden.port)
    out = await run(sys.executable, "-c", code, cwd=ROOT)
    assert "Paris is the capital." in out


@pytest.mark.skipif(
    shutil.which("node") is None or not (NODE / "node_modules").exists(),
    reason="needs Node and `npm ci --prefix tests/node`",
)
@pytest.mark.parametrize("number", range(len(blocks("js"))))
async def test_each_javascript_snippet_works(garden: Program, number: int) -> None:
    code = at(blocks("js")[number], garden.port)
    out = await run("node", "--input-type=module", "-e", code, cwd=NODE)
    assert "Paris is the capital." in out


def test_every_setting_is_in_the_table_with_its_default() -> None:
    table = README.partition("## Settings")[2].partition("## Errors")[0]
    for item in (item for item in fields(Settings) if item.metadata):
        name = item.name.upper()
        rows = [row for row in table.splitlines() if re.match(rf"\|[^|]*`{name}`", row)]
        assert len(rows) == 1, name
        (row,) = rows
        shown = row.split("|")[3].strip().strip("`")
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


def test_every_path_is_in_the_readme() -> None:
    for path in route_table(1).rows:
        name = path.decode().removeprefix("/api/").rstrip("/")
        assert name in README, path
