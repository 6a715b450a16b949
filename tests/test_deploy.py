"""The files in `deploy/`: their own tools check them, and nginx and Caddy run with them."""

import asyncio
import os
import re
import shutil
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from client import KEY, Client, held_stream, question
from conftest import ROOT, Program, Start
from standin import StandIn
from test_limits import certificate

from settings import Settings

DEPLOY = ROOT / "deploy"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where nginx is, and few users look


def tool(name: str) -> str:
    """Find a program, or skip the test."""
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def adapted(name: str, changes: dict[str, str]) -> str:
    """A file of `deploy/` with changes, each of which must be one."""
    text = (DEPLOY / name).read_text()
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


async def run(*command: str, **environ: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **environ},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out = (await process.communicate())[0].decode()
    assert process.returncode == 0, out
    return out


# By their own tools.


async def test_the_unit_is_valid_and_hardened(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    changes = {"/opt/ollprox/.venv/bin/python": sys.executable, "/opt/ollprox": str(ROOT)}
    unit = tmp_path / "ollprox.service"
    unit.write_text(adapted("ollprox.service", changes))
    assert "ollprox" not in await run(analyze, "verify", "--recursive-errors=no", str(unit))
    await run(analyze, "security", "--offline=true", "--threshold=20", str(unit))  # 2.0 of 10


async def test_the_caddyfile_is_valid(tmp_path: Path) -> None:
    file = str(DEPLOY / "Caddyfile")
    out = await run(
        *(tool("caddy"), "validate", "--adapter", "caddyfile", "--config", file),
        XDG_DATA_HOME=str(tmp_path),
        XDG_CONFIG_HOME=str(tmp_path),
    )
    assert "not formatted" not in out


async def test_the_scrape_is_valid(tmp_path: Path) -> None:
    promtool = tool("promtool")
    key = tmp_path / "key"
    key.write_text(KEY)
    file = tmp_path / "prometheus.yml"
    changes = {"/etc/prometheus/ollprox.key": str(key)}
    changes["/etc/prometheus/ollprox-alerts.yml"] = str(DEPLOY / "alerts.yml")
    file.write_text(adapted("prometheus.yml", changes))
    await run(promtool, "check", "config", str(file))


async def test_compose_starts_an_ollama_only_when_asked(tmp_path: Path) -> None:
    docker = tool("docker")
    file = shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    (tmp_path / ".env").touch()
    compose = [docker, "compose", "--file", str(file)]
    try:
        await run(*compose, "version")
    except AssertionError:
        pytest.skip("needs docker compose")
    assert (await run(*compose, "config", "--services")).split() == ["ollprox"]
    both = await run(*compose, "--profile", "ollama", "config", "--services")
    assert sorted(both.split()) == ["ollama", "ollprox"]


async def test_the_cluster_of_compose_is_valid(tmp_path: Path) -> None:
    docker = tool("docker")
    (tmp_path / "deploy").mkdir()
    for name in ("compose.cluster.yml", "nginx-cluster.conf"):
        shutil.copy(DEPLOY / name, tmp_path / "deploy")
    (tmp_path / ".env").touch()
    compose = [docker, "compose", "--file", str(tmp_path / "deploy" / "compose.cluster.yml")]
    try:
        await run(*compose, "version")
    except AssertionError:
        pytest.skip("needs docker compose")
    services = (await run(*compose, "config", "--services")).split()
    assert sorted(services) == ["nginx", "ollprox-1", "ollprox-2", "ollprox-3", "valkey"]


def manifests() -> list[Any]:
    yaml = pytest.importorskip("yaml", reason="needs kubernetes-validate")
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def test_the_manifests_match_the_schemas_of_kubernetes() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    for manifest in manifests():
        validator.validate(manifest, "1.32", strict=True)


def test_the_pods_are_restricted_and_find_their_settings() -> None:
    by_kind: dict[str, list[Any]] = {}
    for manifest in manifests():
        by_kind.setdefault(manifest["kind"], []).append(manifest)
    for workload in (*by_kind["StatefulSet"], *by_kind["Deployment"]):
        template = workload["spec"]["template"]
        labels = workload["spec"]["selector"]["matchLabels"]
        assert labels.items() <= template["metadata"]["labels"].items()
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["terminationGracePeriodSeconds"] > Settings().drain_timeout
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts == {volume["name"] for volume in pod["volumes"]}
    settings = by_kind["ConfigMap"][0]["data"] | by_kind["Secret"][0]["stringData"]
    assert not settings.keys() - {field.name.upper() for field in fields(Settings)}
    pods = {f"ollprox-{n}" for n in range(by_kind["StatefulSet"][0]["spec"]["replicas"])}
    selected = {
        service["metadata"]["name"]
        for service in by_kind["Service"]
        if "statefulset.kubernetes.io/pod-name" in service["spec"]["selector"]
    }
    assert pods == selected
    conf = by_kind["ConfigMap"][1]["data"]["default.conf"]
    assert set(re.findall(r"server (\S+):8000 ", conf)) == pods


def test_the_front_of_kubernetes_is_that_of_the_other_clusters() -> None:
    conf = next(m for m in manifests() if m["metadata"]["name"] == "ollprox-front")
    text = conf["data"]["default.conf"].replace("listen 8080;", "listen 8000;")
    for number in range(3):
        text = text.replace(f"ollprox-{number}:8000", f"127.0.0.1:{8001 + number}")
    assert text in (DEPLOY / "nginx-cluster.conf").read_text()


def test_times_fit_those_of_ollprox() -> None:
    def seconds(name: str, pattern: str) -> int:
        match = re.search(pattern, (ROOT / name).read_text())
        assert match
        return int(match[1])

    default = Settings()
    assert seconds("deploy/ollprox.service", r"TimeoutStopSec=(\d+)") > default.drain_timeout
    assert seconds("docker-compose.yml", r"stop_grace_period: (\d+)s") > default.drain_timeout
    longest = default.connect_timeout + default.first_byte_timeout
    assert seconds("deploy/nginx.conf", r"proxy_read_timeout (\d+)s") > longest
    assert seconds("deploy/nginx.conf", r"keepalive_timeout (\d+)s") < default.keepalive_timeout
    assert seconds("deploy/Caddyfile", r"keepalive (\d+)s") < default.keepalive_timeout
    longest += default.queue_timeout
    for name in ("nginx-cluster.conf", "kubernetes.yaml"):
        assert seconds(f"deploy/{name}", r"proxy_read_timeout (\d+)s") > longest
    for side in ("client", "server"):
        assert seconds("deploy/haproxy.cfg", rf"timeout {side} (\d+)s") > longest
    grace = seconds("deploy/compose.cluster.yml", r"stop_grace_period: (\d+)s")
    assert grace > default.drain_timeout
    for size in ("client_max_body_size", "client_body_buffer_size"):
        megabytes = seconds("deploy/nginx-cluster.conf", rf"{size} (\d+)m")
        assert megabytes << 20 >= default.max_body_bytes


# In front of OllProx.

NGINX = """
daemon off;
pid nginx.pid;
events {}
http {
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include ollprox.conf;
}
"""


def nginx(folder: Path, cert: Path, key: Path, port: int) -> list[str]:
    """Write nginx's configuration; return its command."""
    changes = {
        "listen 443 ssl;": f"listen unix:{folder}/front ssl;",
        "listen [::]:443 ssl;": "",
        "/etc/letsencrypt/live/ollprox.example/fullchain.pem": str(cert),
        "/etc/letsencrypt/live/ollprox.example/privkey.pem": str(key),
        "127.0.0.1:8000": f"127.0.0.1:{port}",
        "/var/log/nginx": str(folder),
        "-error.log error;": "-error.log warn;",  # at which it tells of what it writes to disk
    }
    (folder / "ollprox.conf").write_text(adapted("nginx.conf", changes))
    (folder / "nginx.conf").write_text(NGINX)
    command = [tool("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
    return [*command, "-e", str(folder / "main-error.log")]


def caddy(folder: Path, cert: Path, key: Path, port: int) -> list[str]:
    """Write Caddy's configuration; return its command."""
    changes = {
        "auto_https disable_redirects": "auto_https disable_redirects\n\tadmin off",
        "ollprox.example {": f"localhost {{\n\tbind unix/{folder}/front\n\ttls {cert} {key}",
        "127.0.0.1:8000": f"127.0.0.1:{port}",
    }
    (folder / "Caddyfile").write_text(adapted("Caddyfile", changes))
    return [tool("caddy"), "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


class Front:
    """nginx or Caddy as a process, before OllProx."""

    def __init__(
        self, command: list[str], folder: Path, ollprox: Program, context: ssl.SSLContext
    ) -> None:
        self.command = command
        self.folder = folder
        self.ollprox = ollprox
        self.context = context
        self.process: asyncio.subprocess.Process

    async def start(self) -> None:
        with (self.folder / "output.log").open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                env={"PATH": PATH, "HOME": str(self.folder)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        while not await self.listens():
            assert self.process.returncode is None, self.logs()
            await asyncio.sleep(0.01)

    async def listens(self) -> bool:
        try:
            _, writer = await asyncio.open_unix_connection(self.folder / "front")
        except OSError:
            return False
        writer.close()
        await writer.wait_closed()
        return True

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.wait()

    def logs(self) -> str:
        return "".join(file.read_text() for file in self.folder.glob("*.log"))

    def client(self) -> "FrontClient":
        return FrontClient(self)


class FrontClient(Client):
    """A connection to what stands in front, with TLS."""

    def __init__(self, front: Front) -> None:
        super().__init__(0)
        self.front = front

    async def __aenter__(self) -> "FrontClient":
        self.reader, self.writer = await asyncio.open_unix_connection(
            self.front.folder / "front", ssl=self.front.context, server_hostname="localhost"
        )
        return self


@pytest_asyncio.fixture(params=[nginx, caddy])
async def front(
    request: pytest.FixtureRequest, launch: Start, tmp_path: Path
) -> AsyncIterator[Front]:
    configure: Callable[[Path, Path, Path, int], list[str]] = request.param
    tool(configure.__name__)
    tool("openssl")
    cert, key = certificate(tmp_path, "front")
    folder = tmp_path / "f"
    folder.mkdir()
    ollprox = await launch(API_KEY_IN_PATH="true")
    command = configure(folder, cert, key, ollprox.port)
    front = Front(command, folder, ollprox, ssl.create_default_context(cafile=cert))
    try:
        await front.start()
        yield front
    finally:
        await front.stop()


PATHS = [f"/key/{KEY}/api/generate", "/api/generate"]


@pytest.mark.parametrize("path", PATHS, ids=["key-in-path", "key-in-header"])
async def test_a_line_goes_out_as_it_comes(front: Front, ollama: StandIn, path: str) -> None:
    async with front.client() as client:
        answer = await held_stream(client, ollama, path, question())
    assert [line["response"] for line in answer.lines()] == [*ollama.script.tokens, ""]


@pytest.mark.parametrize("path", PATHS, ids=["key-in-path", "key-in-header"])
async def test_ollama_stops_when_the_client_leaves(
    front: Front, ollama: StandIn, path: str
) -> None:
    ollama.script.hold_before = 1
    async with front.client() as client:
        answer = await client.begin("POST", path, question())
        await anext(client.chunks(answer))
        client.writer.transport.abort()  # nginx does not see a close within TLS alone
    await ollama.until(lambda: ollama.asked()[0].gone)


@pytest.mark.parametrize("path", PATHS, ids=["key-in-path", "key-in-header"])
async def test_a_cut_stream_stays_cut(front: Front, ollama: StandIn, path: str) -> None:
    program = front.command[0]
    if "caddy" in program and re.match(r"v?2\.[0-7]\.", await run(program, "version")):
        pytest.skip("needs Caddy 2.8: older ones end a cut stream as if it were whole")
    ollama.script.break_after = 2
    async with front.client() as client:
        answer = await client.begin("POST", path, question())
        await client.rest(answer)
    assert "error" in answer.lines()[-1]
    assert not answer.complete


@pytest.mark.parametrize(
    "headers",
    [{"APIKEY": KEY}, {"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}],
    ids=lambda headers: next(iter(headers)),
)
async def test_keys_pass(front: Front, headers: dict[str, str]) -> None:
    async with front.client() as client:
        headers = {"APIKEY": "", **headers}
        assert (await client.ask("POST", "/call_model", question(), headers)).status == 200
        headers = dict.fromkeys(headers, "wrong")
        assert (await client.ask("POST", "/call_model", question(), headers)).status == 401


@pytest.mark.parametrize("path", PATHS, ids=["key-in-path", "key-in-header"])
async def test_a_large_body_passes_and_stays_in_memory(
    front: Front, ollama: StandIn, path: str
) -> None:
    body = question("x" * (2 << 20))  # nginx by itself takes 1 MiB
    async with front.client() as client:
        answer = await client.ask("POST", path, body)
        assert answer.lines()[-1]["done"] is True
        assert len(ollama.asked()[0].json()["prompt"]) == 2 << 20
    async with front.client() as client:
        answer = await client.ask("POST", "/call_model", body, {"APIKEY": "wrong"})
        assert answer.status == 401
    await front.stop()
    assert "temporary file" not in front.logs()


async def test_a_key_is_in_no_log(front: Front) -> None:
    paths = [*PATHS, f"//key/{KEY}/api/chat", f"/ollama/key/{KEY}/x", f"/key/{KEY}%0A/x?q={KEY}"]
    paths += [f"/key/key/{KEY}", f"/Key/{KEY}"]
    for up in (True, False):
        if not up:
            await front.ollprox.stop()
        for path in paths:
            async with front.client() as client:
                answer = await client.ask("POST", path, question())
                assert (answer.status == 502) is not up
                # what the front itself refuses, before it looks where the request goes
                await client.send(f"GET {path} HTTP/1.1\r\nHost: a b\r\n\r\n".encode())
                assert (await client.head()).status == 400
    async with front.client() as client:
        answer = await client.begin("GET", f"/key/{KEY}/{'x' * 9000}")
        assert answer.status in {414, 502}
    await front.stop()
    assert front.logs().count("/key/...") >= 2 * len(paths[1:])
    assert "/api/generate" in front.logs()
    assert KEY not in front.logs()
