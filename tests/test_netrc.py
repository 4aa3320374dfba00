"""The netrc that carries the agent's token to a private cache, beside the machine's own entries."""

import os

import closures
import pytest
from hosts import NIX_CONF
from machines import Machine

from activate.agent.netrc import write_netrc
from activate.process import Error


@pytest.mark.promise(11)
def test_it_keeps_the_machines_entries_byte_for_byte(tmp_path):
    own = b"# f\xfcr den Cache im B\xfcro\nmachine nas.example.org password secret"
    (tmp_path / "netrc").write_bytes(own)
    url = "http://deploy.example.org/cache/main"
    file = write_netrc(str(tmp_path / "state"), url, "token", str(tmp_path / "netrc"))
    assert os.stat(file.path).st_mode & 0o777 == 0o600
    with open(file.path, "rb") as netrc:
        assert netrc.read() == b"machine deploy.example.org login x password token\n" + own
    file.close()


@pytest.mark.promise(11)
@pytest.mark.parametrize(
    ("url", "token"),
    [
        ("http://evil machine good:80/", "token"),
        ("http://evil\nmachine good/", "token"),
        ("http://x default/", "token"),
        ("http://x password p\rmacdef init/", "token"),
        ("file:///x", "token"),
        ("daemon", "token"),
        ("http://deploy.example.org/", "to ken"),
        ("http://deploy.example.org/", "token\nmachine other"),
        ("http://deploy.example.org/", ""),
    ],
)
def test_nothing_but_one_host_and_one_token_gets_into_it(tmp_path, url, token):
    with pytest.raises(Error, match="can't stand in a netrc"):
        write_netrc(str(tmp_path / "state"), url, token, "/nowhere")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("host", ["a-b.example", "a_b", "10.0.0.1", "[::1]"])
def test_hosts_that_it_takes(tmp_path, host):
    file = write_netrc(str(tmp_path / "state"), f"http://{host}:80/", "t", "/nowhere")
    with open(file.path) as netrc:
        assert netrc.read() == f"machine {host.strip('[]')} login x password t\n"
    file.close()


@pytest.mark.parametrize("own", [b"machine nas.example.org login joe password secret\n", b"\xfc"])
@pytest.mark.long
def test_a_private_cache_beside_another_entry(host, make_workspace, name, own):
    """Nix's curl 7.88 drops an entry without a login as soon as there is another one."""
    workspace = make_workspace(private=True)
    netrc = host.directory / "netrc"
    netrc.write_bytes(own)
    (host.directory / "etc/nix.conf").write_text(f"{NIX_CONF}netrc-file = {netrc}\n")
    path = closures.plain(workspace.files, name)
    outcome = Machine(host, workspace, name).deploy(path)
    assert outcome.status == "Succeeded" and host.profile() == path, outcome
