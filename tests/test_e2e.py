"""The same clients through OllProx against a real Ollama, if you have one.

OLLPROX_E2E_OLLAMA=host:port OLLPROX_E2E_MODEL=name make test-e2e
"""

import asyncio
import os
from typing import Any

import ollama as ollama_client
import openai
import pytest
from client import KEY, ask
from conftest import Program, Start

OLLAMA = os.environ.get("OLLPROX_E2E_OLLAMA", "")
MODEL = os.environ.get("OLLPROX_E2E_MODEL", "")
OPTIONS = {"seed": 1, "temperature": 0, "num_predict": 8}
MESSAGES: list[Any] = [{"role": "user", "content": "Say hi."}]

pytestmark = [
    pytest.mark.skipif(
        not (OLLAMA and MODEL), reason="OLLPROX_E2E_OLLAMA and OLLPROX_E2E_MODEL are not set"
    ),
    pytest.mark.timeout(600),  # a model may have to be loaded first
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
async def real(launch: Start) -> Program:
    return await launch(OLLAMA_HOST=OLLAMA)


async def test_call_model_is_a_miss_and_then_a_hit(real: Program) -> None:
    body = {"model": MODEL, "prompt": "Say hi.", "options": OPTIONS}
    miss = await ask(real.port, "POST", "/call_model", body)
    hit = await ask(real.port, "POST", "/call_model", body)
    assert miss.json()["done"] is True
    assert miss.cache_status == "OllProx; fwd=miss; stored"
    assert (hit.body, "hit" in hit.cache_status) == (miss.body, True)
    stream = await ask(real.port, "POST", "/api/generate", body)
    said = "".join(line["response"] for line in stream.lines())
    assert said == miss.json()["response"]


async def test_the_ollama_package(real: Program) -> None:
    def use() -> list[str]:
        headers = {"Authorization": f"Bearer {KEY}"}
        client = ollama_client.Client(host=f"http://127.0.0.1:{real.port}", headers=headers)
        assert MODEL in str(client.list())
        stream = client.chat(MODEL, MESSAGES, stream=True, options=OPTIONS)
        streamed = "".join(part.message.content or "" for part in stream)
        return [streamed, client.chat(MODEL, MESSAGES, options=OPTIONS).message.content or ""]

    streamed, whole = await asyncio.to_thread(use)
    assert streamed == whole


async def test_the_openai_package(real: Program) -> None:
    def use() -> list[str]:
        base = f"http://127.0.0.1:{real.port}/v1"
        with openai.OpenAI(base_url=base, api_key=KEY, max_retries=0) as client:
            answers = [
                client.chat.completions.create(
                    model=MODEL, messages=MESSAGES, seed=1, temperature=0, max_tokens=8
                )
                for _ in range(2)
            ]
            return [answer.model_dump_json() for answer in answers]

    first, second = await asyncio.to_thread(use)
    assert first == second


async def test_an_unknown_model(real: Program) -> None:
    body = {"model": "no-such-model", "prompt": "x"}
    assert (await ask(real.port, "POST", "/call_model", body)).status == 404
