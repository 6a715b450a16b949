"""A short soak; `make soak` runs a long one."""

import asyncio
import sys

import pytest
from conftest import ROOT


@pytest.mark.timeout(90)
async def test_a_short_soak_finds_nothing() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "bench" / "soak.py"), "--seconds", "6", "--clients", "20"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out = (await process.communicate())[0].decode()
    assert process.returncode == 0, out  # its first line is the seed
    assert "200 hit" in out
    assert "collapsed" in out
