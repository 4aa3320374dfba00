"""contrib/nginx.conf and contrib/Caddyfile, in Debian's nginx and Caddy.

Only addresses and the certificate differ from what the files have.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import closures
import pytest
import requests
from hosts import PROJECT, Host, clean_environment, command
from live import Workspace
from machines import Machine
from test_workspace_tls import make
from workspace_support import wait_for

PATH = "/usr/sbin:/usr/bin:/bin"
NGINX, CADDY = (shutil.which(name, path=PATH) for name in ("nginx", "caddy"))
CONTRIB = PROJECT / "contrib"
# The rest of a configuration, as little of it as there can be.
MAIN = """\
user root;
daemon off;
error_log {directory}/error.log;
pid {directory}/pid;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    include {directory}/conf.d/*.conf;
}}
"""
pytestmark = [pytest.mark.long, pytest.mark.slow]
FRONTS = {"nginx": NGINX, "caddy": CADDY}
IDLE = {"nginx": 300, "caddy": 70}  # seconds
CADDY_OPTIONS = "{\n\tadmin off\n\tauto_https disable_redirects\n\tskip_install_trust\n}\n"


def need(name: str) -> None:
    if FRONTS[name] is None:
        pytest.skip(f"no {name}: `make test-slow` installs it as root on Debian")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def nginx(directory: Path, text: str, port: int) -> Iterator[None]:
    """nginx with a configuration, listening on a port."""
    (directory / "conf.d").mkdir(parents=True)
    (directory / "nginx.conf").write_text(MAIN.format(directory=directory))
    (directory / "conf.d" / "workspace.conf").write_text(text)
    with listening(
        [str(NGINX), "-p", str(directory), "-c", str(directory / "nginx.conf")], directory, port
    ):
        yield


@contextmanager
def caddy(directory: Path, text: str, port: int) -> Iterator[None]:
    """Caddy with a configuration, listening on a port."""
    directory.mkdir()
    file = directory / "Caddyfile"
    file.write_text(CADDY_OPTIONS + text)
    with listening(
        [str(CADDY), "run", "--config", str(file), "--adapter", "caddyfile"], directory, port
    ):
        yield


@contextmanager
def listening(argv: list[str], directory: Path, port: int) -> Iterator[None]:
    """A program that listens on a port until the end of the block."""
    environment = {**os.environ, "HOME": str(directory), "XDG_DATA_HOME": str(directory)}
    with open(directory / "messages", "wb") as file:
        process = subprocess.Popen(argv, env=environment, stderr=file)

    def listens() -> bool:
        assert process.poll() is None, (directory / "messages").read_text()
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(listens)
        yield
    finally:
        process.terminate()
        process.wait(30)


def adapted(port: int, workspace_port: int, pair: tuple[Path, Path]) -> str:
    """contrib/nginx.conf with the addresses and the certificate of a test."""
    return substituted(
        (CONTRIB / "nginx.conf").read_text(),
        (r"listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        (r"listen \[::\]:443 ssl;", ""),
        (r"listen 80;", f"listen 127.0.0.1:{free_port()};"),
        (r"listen \[::\]:80;", ""),
        (r"server 127\.0\.0\.1:8080;", f"server 127.0.0.1:{workspace_port};"),
        (r"(ssl_certificate +)\S+;", rf"\g<1>{pair[0]};"),
        (r"(ssl_certificate_key +)\S+;", rf"\g<1>{pair[1]};"),
        (r"server_name deploy\.example\.org;", "server_name localhost;"),
    )


def adapted_caddy(port: int, workspace_port: int, pair: tuple[Path, Path]) -> str:
    """contrib/Caddyfile likewise."""
    return substituted(
        (CONTRIB / "Caddyfile").read_text(),
        (r"deploy\.example\.org \{", f"https://localhost:{port} {{\n\ttls {pair[0]} {pair[1]}"),
        (r"127\.0\.0\.1:8080", f"127.0.0.1:{workspace_port}"),
    )


def substituted(text: str, *pairs: tuple[str, str]) -> str:
    for pattern, value in pairs:
        text, count = re.subn(pattern, value, text)
        assert count, pattern
    return text


class Behind(Workspace):
    """A workspace that its users reach by a proxy only."""

    inside = ""
    front = ""

    def serve_at(self, url: str, *args: str) -> None:
        """Serve, where the proxy has the URL."""
        self.serve("--behind-proxy=1", f"--public-url={url}", *args)
        self.inside, self.url = self.url, url


@pytest.fixture(params=list(FRONTS))
def behind(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Behind, Path]]:
    """A workspace behind nginx or Caddy; the certificate to trust."""
    need(request.param)
    pair, port, workspace = make(tmp_path / "tls"), free_port(), Behind(tmp_path / "workspace")
    workspace.front = request.param
    monkeypatch.setenv("SSL_CERT_FILE", str(pair[0]))
    try:
        workspace.serve_at(f"https://localhost:{port}")
        place = (port, int(workspace.inside.rpartition(":")[2]), pair)
        if request.param == "nginx":
            front = nginx(tmp_path / "front", adapted(*place), port)
        else:
            front = caddy(tmp_path / "front", adapted_caddy(*place), port)
        with front:
            yield workspace, pair[0]
    finally:
        workspace.kill()


@pytest.mark.timeout(600)
def test_an_agent_stays_connected_and_deploys(
    host: Host, behind: tuple[Behind, Path], name: str
) -> None:
    """Idle for longer than a proxy's own timeouts of 60 s; the lines of a log come as written."""
    workspace, certificate = behind
    workspace.cache(private=True)
    machine = Machine(host, workspace, name, env={"SSL_CERT_FILE": str(certificate)})
    time.sleep(IDLE[workspace.front])
    assert machine.agent.text().count("is connected") == 1
    go = host.path("/run/go")
    waits = f"echo first line; {closures.wait_for('/run/go')}; echo last line"
    path = closures.nixos(machine.files, 1, before=waits)
    deployment = machine.order(path)
    follow = subprocess.Popen(
        [*command("cachix-deploy"), "activate", spec(workspace, name, path)]
        + [f"--host={workspace.url}", "--timeout=120"],
        env={
            **clean_environment(workspace.directory),
            "SSL_CERT_FILE": str(certificate),
            "CACHIX_ACTIVATE_TOKEN": workspace.token("activate"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: "first line" in workspace.text(deployment), 60)
    assert "last line" not in workspace.text(deployment)
    go.touch()
    output = follow.communicate(timeout=120)[0]
    assert follow.returncode == 0, output
    assert "last line" in output
    assert machine.agent.text().count("is connected") == 1


def spec(workspace: Workspace, name: str, path: str) -> str:
    file = workspace.directory / "deploy.json"
    file.write_text(json.dumps({"agents": {name: path}}))
    return str(file)


@pytest.mark.timeout(300)
def test_a_large_nar_is_pushed(host: Host, behind: tuple[Behind, Path], tmp_path: Path) -> None:
    """200 MB by Nix itself, and back again. The proxy keeps nothing of it on its disk."""
    workspace, certificate = behind
    secret = workspace.cli("cache", "create", "main")
    key, netrc = tmp_path / "key", tmp_path / "netrc"
    key.write_text(secret)
    netrc.write_text(f"machine localhost login x password {workspace.token('activate')}\n")
    builder = '[ "-c" "head -c 200000000 /dev/urandom > $out" ]'
    text = (
        'derivation { name = "large"; system = builtins.currentSystem; builder = "/bin/sh"; '
        f'PATH = "/usr/bin:/bin"; args = {builder}; }}'
    )
    path = host.output("nix-build", "--no-out-link", "--expr", text).strip().splitlines()[-1]
    to = f"{workspace.url}/cache/main?secret-key={key}&compression=none"
    trust = {"NIX_SSL_CERT_FILE": str(certificate), "SSL_CERT_FILE": str(certificate)}
    nix = ["nix", "--option", "netrc-file", str(netrc)]
    result = host.run([*nix, "copy", "--to", to, path], env=trust)
    assert result.returncode == 0, result
    assert list((tmp_path / "front").glob("body/*")) == []
    host.output("nix-store", "--delete", path)
    result = host.run([*nix, "copy", "--no-check-sigs", "--from", to, path], env=trust)
    assert result.returncode == 0, result
    assert host.path(path).stat().st_size == 200_000_000


@pytest.mark.parametrize("front", list(FRONTS))
def test_nars_of_public_caches_are_sent_by_the_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, front: str
) -> None:
    """Also while the workspace is away; those of other caches, and uploads, are not its own."""
    need(front)
    pair, port, workspace = make(tmp_path / "tls"), free_port(), Behind(tmp_path / "workspace")
    monkeypatch.setenv("SSL_CERT_FILE", str(pair[0]))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(pair[0]))
    caches = tmp_path / "srv" / "cache"
    try:
        workspace.serve_at(f"https://localhost:{port}", f"--cache-directory={caches}")
        place = (port, int(workspace.inside.rpartition(":")[2]), pair)
        text = adapted(*place) if front == "nginx" else adapted_caddy(*place)
        text = substituted(
            text, (r"/srv/nix\b(?!/)", str(tmp_path / "srv")), (r"(?m)^([ \t]+)#(?! \S)", r"\1")
        )
        start = nginx if front == "nginx" else caddy
        with start(tmp_path / "front", text, port):
            pushed = {name: nar_of(workspace, name) for name in ("main", "closed")}
            workspace.kill()
            assert requests.get(pushed["closed"], timeout=10).status_code == 502
            answer = requests.get(pushed["main"], timeout=10)
            assert answer.ok and answer.headers["Content-Type"] == "application/x-nix-nar"
            assert answer.content == next((caches / "main" / "nar").glob("*.nar*")).read_bytes()
            assert requests.head(pushed["main"], timeout=10).ok
            assert requests.put(pushed["main"], b"x", timeout=10).status_code == 502
            missing = pushed["main"].replace("/nar/", "/nar/0")
            assert requests.get(missing, timeout=10).status_code == 502
    finally:
        workspace.kill()


def nar_of(workspace: Behind, name: str) -> str:
    """The URL of a NAR that was pushed to a new cache."""
    path = workspace.cache(name, private=name != "main").add(name, b"contents\n")
    workspace.push(path)
    file = workspace.files.archive(path).relative_to(workspace.files.directory)
    return f"{workspace.cache_url}/{file}"


def test_a_proxy_that_passes_no_upgrade_is_named(host: Host, tmp_path: Path, name: str) -> None:
    """Both agent and `activate` say what to do, and where the configuration is."""
    need("nginx")
    port, workspace = free_port(), Behind(tmp_path / "workspace")
    try:
        workspace.serve_at(f"http://127.0.0.1:{port}")
        text = (
            f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {workspace.inside}; }} }}"
        )
        with nginx(tmp_path / "nginx", text, port):
            token = workspace.token("agent")
            agent = host.agent(name, workspace.url, token)
            agent.wait_for("proxy", 30)
            workspace.url = workspace.inside
            path = closures.plain(workspace.cache(), name)
            direct = host.agent(f"{name}-2", workspace.inside, token)
            direct.wait_for("is connected", 30)
            result = subprocess.run(
                [*command("cachix-deploy"), "activate", spec(workspace, f"{name}-2", path)]
                + [f"--host=http://127.0.0.1:{port}", "--timeout=20"],
                env={
                    **clean_environment(workspace.directory),
                    "CACHIX_ACTIVATE_TOKEN": workspace.token("activate"),
                },
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            for output in (agent.text(), result.stderr):
                assert "Upgrade" in output and "proxy" in output, output
    finally:
        workspace.kill()
