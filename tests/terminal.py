"""Record a terminal with a miss and a hit, and write it as `docs/demo.svg`.

Usage: python tests/terminal.py. It asks OllProx, before the stand-in, by curl; each line appears
in the picture at the time at which it came.
"""

import asyncio
import html
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from client import KEY  # noqa: E402 - the path had to be set first
from standin import Script, StandIn  # noqa: E402

from settings import Settings  # noqa: E402

COMMAND = r"""time curl -sD- localhost:8000/call_model -H "APIKEY: $KEY" \
    -d '{"model": "llama2", "prompt": "What is the capital of France?"}' |
    grep -oE 'Cache-Status.*|"response":"[^"]*"'"""
PACE = 0.5  # seconds between two tokens of the stand-in; a model on a CPU takes as long
PAUSE = 1.0  # seconds before a command is typed
LINE, LEFT, TOP, WIDTH = 20, 18, 54, 720  # pixels

Line = tuple[float, str, str]  # when it came, in seconds; its class; its text

PAGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"
 viewBox="0 0 {width} {height}" role="img" aria-label="{label}">
<style>
rect {{ fill: #1b1f27 }}
text {{ font: 13px ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre;
  fill: #c9d1d9; animation: come .01s both }}
.typed {{ fill: #79c0ff }} .miss {{ fill: #ffa657 }} .hit {{ fill: #7ee787 }}
.took {{ font-weight: bold }}
@keyframes come {{ from {{ opacity: 0 }} to {{ opacity: 1 }} }}
@media (prefers-reduced-motion) {{ text {{ animation: none }} }}
</style>
<rect width="{width}" height="{height}" rx="8"/>
<circle cx="20" cy="18" r="6" fill="#ff5f57"/><circle cx="40" cy="18" r="6" fill="#febc2e"/>
<circle cx="60" cy="18" r="6" fill="#28c840"/>
{lines}
</svg>
"""


async def record() -> list[Line]:
    """Ask the same twice; return the lines of the terminal."""
    standin = StandIn(Script(pace=PACE))
    port = await standin.start()
    environ = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME"}}
    environ |= {name.upper(): "" for name in Settings.__dataclass_fields__}  # whatever .env says
    environ |= {"KEY": KEY, "TIMEFORMAT": "%R s", "LISTEN_HOST": "127.0.0.1", "LISTEN_PORT": "0"}
    keys = tempfile.NamedTemporaryFile("w", suffix=".txt")  # noqa: SIM115 - closed below
    print(KEY, file=keys, flush=True)
    environ |= {"OLLAMA_PORT": str(port), "API_KEY_FILE": keys.name, "LOG_LEVEL": "WARNING"}
    ollprox = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "ollprox.py")), env=environ, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert ollprox.stdout
        ours = (await ollprox.stdout.readline()).decode().split(":")[-1].strip()
        began, lines = time.monotonic(), []
        for _ in range(2):
            await asyncio.sleep(PAUSE)
            now = time.monotonic() - began
            lines += [(now, "typed", text) for text in f"$ {COMMAND}".splitlines()]
            lines += await run(COMMAND.replace("8000", ours), environ, began)
        return lines
    finally:
        ollprox.terminate()
        await ollprox.wait()
        keys.close()
        await standin.stop()


async def run(command: str, environ: dict[str, str], began: float) -> list[Line]:
    """Run a command in bash; return its lines."""
    shell = await asyncio.create_subprocess_exec(
        *("bash", "-c", command),
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert shell.stdout
    lines = []
    async for line in shell.stdout:
        text = line.decode().strip()
        if text:
            lines.append((time.monotonic() - began, kind(text), text))
    assert await shell.wait() == 0, lines
    return [*lines, (lines[-1][0], "", "")]


def kind(text: str) -> str:
    """Return the class of a line that came."""
    if text.startswith("Cache-Status"):
        return "hit" if "; hit" in text else "miss"
    return "took" if text.endswith(" s") else ""


def draw(lines: list[Line]) -> str:
    """Return the picture."""
    texts = [
        f'<text x="{LEFT}" y="{TOP + LINE * number}" class="{name}"'
        f' style="animation-delay:{when:.2f}s">{html.escape(text, quote=False)}</text>'
        for number, (when, name, text) in enumerate(lines)
        if text
    ]
    took = [text for _, name, text in lines if name == "took"]
    label = f"The same question twice: the model takes {took[0]}, the cache takes {took[1]}."
    height = TOP + LINE * (len(lines) - 1)
    return PAGE.format(width=WIDTH, height=height, label=label, lines="\n".join(texts))


if __name__ == "__main__":
    (ROOT / "docs" / "demo.svg").write_text(draw(asyncio.run(record())))
