"""The modules for NixOS, nix-darwin and home-manager, evaluated: what machines get of them."""

import json
import os
import re
import shutil
import subprocess

import pytest
from hosts import PROJECT
from nixmodules import Refused, evaluate, exec_start, nix, setting, world

import cachix_options
from cachix_options import parse

KINDS = ("nixos", "darwin", "home-manager")
AGENT = {
    "nixos": "services.cachix-deploy.enable = true;",
    "darwin": "services.cachix-deploy.enable = true;",
    "home-manager": 'services.cachix-deploy = { enable = true; name = "alice-laptop"; };',
}
NAMES = {"nixos": "web", "darwin": "mac", "home-manager": "alice-laptop"}
WORKSPACE = "services.cachix-workspace.enable = true;"
MAC = {"platform": '"aarch64-darwin"'}
KEY = "ci-1:ao0FIIJsQVqa2EvZoCSGIcWHtNHAyYOL9j2Gyya1eOU="
FILES = sorted(
    path.relative_to(PROJECT)
    for folder in ("nix", "tests", ".")
    for path in PROJECT.glob(f"{folder}/**/*.nix" if folder == "nix" else f"{folder}/*.nix")
)


def agent(kind, settings="", **arguments):
    """A machine with an agent, of which all assertions hold."""
    done = evaluate(kind, AGENT[kind], settings, **arguments)
    assert done.failed == []
    return done


def options_of(argv, monkeypatch):
    """The options that the program reads from an agent's command line."""
    monkeypatch.setenv("CACHIX_AGENT_TOKEN", "token")
    options = parse([word for word in argv[1:] if not word.startswith("--token-file=")])
    return cachix_options.agent_options(options)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_is_parsed(path):
    subprocess.run(["nix-instantiate", "--parse", str(PROJECT / path)], check=True, timeout=60)


# --- the agent ------------------------------------------------------------------------------------


def test_the_unit_of_nixos():
    unit = agent("nixos").units["cachix-deploy"]
    unit = re.sub("/nix/store/[0-9a-f]{32}", "STORE", unit)
    path = re.search(r'"PATH=(.*)"', unit)
    assert path and path[1].startswith("STORE-nix/bin:") and "STORE-systemd/bin" in path[1]
    assert (
        unit.replace(path[0], '"PATH=..."')
        == """\
[Unit]
After=network-online.target
Description=Deployment agent
StartLimitIntervalSec=0
Wants=network-online.target

[Service]
Environment="NIX_SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"
Environment="PATH=..."
Environment="USER=root"
ExecStart="STORE-cachix-deploy/bin/cachix-deploy" "--confirm-timeout=120" \
"--activation-timeout=3600" "--on-unit-failure=rollback" "--on-reboot-needed=fail" \
"--require-tls" "agent" "web"
LoadCredential=CACHIX_AGENT_TOKEN:/etc/cachix-agent.token
Restart=on-failure
RestartMaxDelaySec=300
RestartPreventExitStatus=64
RestartSec=5
RestartSteps=6
StateDirectory=cachix-deploy
StateDirectoryMode=0700
TimeoutStopSec=20
Type=exec
X-StopIfChanged=false

[Install]
WantedBy=multi-user.target
"""
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_commands_at_the_machine_are_there(kind):
    """An operator at the console has a shell, and nothing else."""
    assert any("cachix-deploy" in path for path in agent(kind).commands)


def test_the_unit_of_home_manager():
    done = agent("home-manager")
    unit = re.sub("/nix/store/[0-9a-f]{32}", "STORE", done.units["cachix-deploy"])
    assert done.plists == {}
    assert (
        unit
        == """\
[Install]
WantedBy=default.target

[Service]
Environment=PATH=STORE-nix/bin:/nix/var/nix/profiles/default/bin:/run/current-system/sw/bin:\
/usr/bin:/bin:/usr/sbin:/sbin
ExecStart="STORE-cachix-deploy/bin/cachix-deploy" "--confirm-timeout=120" \
"--activation-timeout=3600" "--on-unit-failure=rollback" "--on-reboot-needed=fail" \
"--require-tls" "agent" "alice-laptop" "--token-file=/home/alice/.config/cachix-agent.token"
Restart=on-failure
RestartMaxDelaySec=300
RestartPreventExitStatus=64
RestartSec=5
RestartSteps=6
TimeoutStopSec=20
Type=exec

[Unit]
Description=Deployment agent
StartLimitIntervalSec=0
"""
    )


def test_the_daemon_of_nix_darwin():
    done = agent("darwin")
    plist = done.plists["cachix-deploy"]
    path = plist["EnvironmentVariables"]["PATH"].split(":")
    assert "HOME" not in str(path) and path[0].endswith("-nix/bin")
    assert {"/run/current-system/sw/bin", "/usr/bin", "/usr/sbin"} < set(path)
    assert plist["EnvironmentVariables"]["USER"] == "root"
    assert plist["EnvironmentVariables"]["NIX_SSL_CERT_FILE"].endswith("/ca-bundle.crt")
    assert done.argv[-3:] == ["agent", "mac", "--token-file=/etc/cachix-agent.token"]
    rest = {key: plist[key] for key in plist.keys() - {"EnvironmentVariables", "ProgramArguments"}}
    assert rest == {
        "Label": "org.nixos.cachix-deploy",
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 10,
        "ExitTimeOut": 20,
        "ProcessType": "Interactive",
        "WatchPaths": ["/etc/cachix-agent.token"],
        "StandardOutPath": "/var/log/cachix-deploy.log",
        "StandardErrorPath": "/var/log/cachix-deploy.log",
    }
    rotation = done.etc["newsyslog.d/cachix-deploy.conf"].splitlines()[-1].split()
    assert rotation == ["/var/log/cachix-deploy.log", "root:wheel", "640", "5", "1024", "*", "N"]
    # who lets others manage Nix must not read nix.package
    path = agent("darwin", "nix.enable = false;").plists["cachix-deploy"]["EnvironmentVariables"]
    assert path["PATH"].startswith("/nix/var/nix/profiles/default/bin:")


def test_the_agent_of_home_manager_on_macos():
    done = agent("home-manager", **MAC)
    plist = done.plists["cachix-deploy"]
    assert done.units == {} and done.argv[-3:-1] == ["agent", "alice-laptop"]
    assert plist["KeepAlive"] == {"SuccessfulExit": False} and plist["RunAtLoad"] is True
    assert plist["WatchPaths"] == ["/home/alice/.config/cachix-agent.token"]
    assert plist["StandardErrorPath"] == "/home/alice/Library/Logs/cachix-deploy.log"


def test_nothing_is_there_unless_it_is_enabled():
    for kind in KINDS:
        done = evaluate(kind, "")
        assert (done.failed, done.units, done.plists, done.etc) == ([], {}, {}, {})


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_understands_the_defaults(kind, monkeypatch):
    argv = agent(kind).argv
    assert argv[0].endswith("-cachix-deploy/bin/cachix-deploy")
    options = options_of(argv, monkeypatch)
    assert options == options_of(["", "--require-tls", "agent", NAMES[kind]], monkeypatch)
    assert options.peer.host == "https://cachix.org" and options.profile is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("name", '"db.example-1"', "db.example-1"),
        ("profile", '"other"', "other"),
        ("host", '"https://deploy.example.org"', "--host=https://deploy.example.org"),
        ("verbose", "true", "--verbose"),
        ("confirmTimeout", "30", "--confirm-timeout=30"),
        ("activationTimeout", "60", "--activation-timeout=60"),
        ("onUnitFailure", '"tolerate"', "--on-unit-failure=tolerate"),
        ("onRebootNeeded", '"boot"', "--on-reboot-needed=boot"),
        ("trustedKeys", f'[ "{KEY}" ]', f"--trusted-key={KEY}"),
        ("deploymentKeys", f'[ "{KEY}" ]', f"--deployment-key={KEY}"),
        ("rebootWindow", '"Mon..Fri 02:00-04:00"', "--reboot-window=Mon..Fri 02:00-04:00"),
        ("postDeploy", '"/etc/tell"', "--post-deploy=/etc/tell"),
        ("metricsFile", "/var/lib/x.prom", "--metrics-file=/var/lib/x.prom"),
        ("extraArgs", '[ "--unsigned-rollback=0" ]', "--unsigned-rollback=0"),
    ],
)
def test_each_option_reaches_the_command_line(kind, option, value, word, monkeypatch):
    argv = agent(kind, f"services.cachix-deploy.{option} = lib.mkForce ({value});").argv
    assert word in argv and word not in agent(kind).argv
    options_of(argv, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_options_that_are_not_words_of_the_command_line(kind):
    done = agent(kind, "services.cachix-deploy.insecure = true;")
    assert "--require-tls" not in done.argv
    for value in ('"/run/secrets/token"', "/run/secrets/token"):  # a path is not copied
        done = agent(kind, f"services.cachix-deploy.credentialsFile = {value};")
        if kind == "nixos":
            credential = setting(done.units["cachix-deploy"], "LoadCredential")
            assert credential == "CACHIX_AGENT_TOKEN:/run/secrets/token"
        else:
            assert done.argv[-1] == "--token-file=/run/secrets/token"
    done = agent(kind, "services.cachix-deploy.package = pkgs.cachix;")
    assert done.argv[0].endswith("-cachix/bin/cachix-deploy")
    if kind == "darwin":
        done = agent(kind, 'services.cachix-deploy.logFile = "/tmp/log";')
        assert done.plists["cachix-deploy"]["StandardErrorPath"] == "/tmp/log"
        assert "/tmp/log root:wheel" in done.etc["newsyslog.d/cachix-deploy.conf"]


@pytest.mark.parametrize("kind", KINDS)
def test_words_reach_the_program_as_they_are(kind):
    words = ["a b", "c$d", "e%h", 'f"g', "h'i", "j\\k", "$(l)", "m;n", "ä"]
    nix_words = " ".join(
        json.dumps(word, ensure_ascii=False).replace("$(", "\\$(") for word in words
    )
    assert agent(kind, f"services.cachix-deploy.extraArgs = [ {nix_words} ];").argv[6:15] == words


def test_the_proxy_of_the_machine():
    proxy = 'networking.proxy.envVars = { https_proxy = "http://proxy:3128"; USER = "no"; };'
    unit = agent("nixos", proxy).units["cachix-deploy"]
    assert 'Environment="https_proxy=http://proxy:3128"\n' in unit and '"USER=root"' in unit


def test_the_agent_is_not_sandboxed():
    """The scope in which a system is activated would inherit it, and fail in silence."""
    for kind in ("nixos", "home-manager"):
        unit = agent(kind).units["cachix-deploy"]
        forbidden = "Protect|Private|Restrict|NoNew|UMask|System|Capab|DynamicUser|KillMode|Conflic"
        assert re.findall(rf"^(?:{forbidden}).*", unit, re.MULTILINE) == []


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("name", '""'),
        ("name", '"a b"'),
        ("name", '".hidden"'),
        ("name", '"ä"'),
        ("name", f'"{"x" * 129}"'),
        ("confirmTimeout", "0"),
        ("activationTimeout", "-1"),
        ("confirmTimeout", '"120"'),
        ("onUnitFailure", '"ignore"'),
        ("onRebootNeeded", '"reboot"'),
        ("trustedKeys", f'"{KEY}"'),
        ("verbose", '"yes"'),
        ("credentialsFile", '"relative"'),
    ],
)
def test_values_of_a_wrong_type(kind, option, value):
    with pytest.raises(Refused, match=f"services.cachix-deploy.{option}' is not of type"):
        agent(kind, f"services.cachix-deploy.{option} = lib.mkForce ({value});")


@pytest.mark.parametrize("kind", KINDS)
def test_options_that_do_not_exist(kind):
    with pytest.raises(Refused, match="option `services.cachix-deploy.hots' does not exist"):
        agent(kind, 'services.cachix-deploy.hots = "https://deploy.example.org";')


def test_a_name_that_is_missing():
    with pytest.raises(
        Refused, match=r"services.cachix-deploy.name' was accessed but has no value"
    ):
        evaluate("home-manager", "services.cachix-deploy.enable = true;")


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_in_the_store(kind):
    token = 'services.cachix-deploy.credentialsFile = "/nix/store/x-source/token";'
    (sentence,) = evaluate(kind, AGENT[kind], token).failed
    assert sentence.startswith("services.cachix-deploy.credentialsFile is in the Nix store")


@pytest.mark.parametrize("kind", KINDS)
def test_two_agents_of_one_name(kind):
    other = 'services.cachix-agent = { enable = true; name = "%s"; };'
    (sentence,) = evaluate(kind, AGENT[kind], other % NAMES[kind]).failed
    assert f'are both named "{NAMES[kind]}"' in sentence
    assert evaluate(kind, AGENT[kind], other % "another").failed == []


def test_the_name_of_a_user_at_a_host():
    name = 'services.cachix-deploy = { enable = true; name = "alice@laptop"; };'
    (sentence,) = evaluate("home-manager", name).failed
    assert "alice-laptop" in sentence


# --- the workspace --------------------------------------------------------------------------------


def workspace(*settings):
    """A machine with a workspace, of which all assertions hold."""
    done = evaluate("nixos", WORKSPACE, *settings)
    assert done.failed == []
    return done


def serve(done):
    """The arguments of `serve`."""
    program, command, *words = exec_start(done.units["cachix-workspace"])
    assert program.endswith("-cachix-workspace/bin/cachix-workspace") and command == "serve"
    return words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("", []),
        ("publicUrl", ["--public-url=https://deploy.example.org"]),
        ("listenAddress", ["--listen=192.0.2.1:8080"]),
        ("ipv6", ["--listen=[::]:8080"]),
        ("port", ["--listen=127.0.0.1:80"]),
        ("maxConnections", ["--max-connections=100"]),
        ("keep", ["--keep-deployments=100", "--keep-days=365"]),
        ("extraArgs", ["--max-nar=20"]),
        ("nginx", ["--public-url=https://deploy.example.org", "--behind-proxy=1"]),
    ],
)
def test_each_option_of_the_workspace(settings, words):
    text = {
        "": "",
        "publicUrl": 'publicUrl = "https://deploy.example.org";',
        "listenAddress": 'listenAddress = "192.0.2.1";',
        "ipv6": 'listenAddress = "::";',
        "port": "port = 80;",
        "maxConnections": "maxConnections = 100;",
        "keep": "keepDeployments = 100; keepDays = 365;",
        "extraArgs": 'extraArgs = [ "--max-nar=20" ];',
        "nginx": 'nginx = { enable = true; domain = "deploy.example.org"; };',
    }
    done = workspace(f"services.cachix-workspace = {{ {text[settings]} }};")
    names = [word.partition("=")[0] for word in words]
    defaults = ["--listen=127.0.0.1:8080", "--max-connections=16000"]
    kept = [word for word in defaults if word.partition("=")[0] not in names]
    assert sorted(serve(done)) == sorted([*kept, *words])
    files = 100 + 4096 if settings == "maxConnections" else 20096
    unit = done.units["cachix-workspace"]
    assert setting(unit, "LimitNOFILE") == str(files)
    assert (setting(unit, "AmbientCapabilities") == "CAP_NET_BIND_SERVICE") == (settings == "port")


def test_the_command_line_of_the_workspace_is_one_of_its_program():
    from cachix_workspace.cli import usage

    nginx = 'nginx = { enable = true; domain = "deploy.example.org"; };'
    done = workspace(f"services.cachix-workspace = {{ {nginx} }};")
    assert usage.parse(["serve", *serve(done)])["--behind-proxy"] == "1"


def test_nginx_and_the_firewall():
    nginx = 'nginx = { enable = true; domain = "deploy.example.org"; };'
    done = workspace(f"services.cachix-workspace = {{ {nginx} openFirewall = true; }};")
    assert done.ports == [80, 443]
    host = done.nginx["virtualHosts"]["deploy.example.org"]
    place = host["locations"]["/"]
    assert host["forceSSL"] and host["enableACME"] and done.nginx["enable"]
    assert place["proxyWebsockets"] and place["recommendedProxySettings"]
    assert place["proxyPass"] == "http://127.0.0.1:8080"
    assert place["extraConfig"].splitlines() == [
        "client_max_body_size 0;",
        "proxy_request_buffering off;",
        "proxy_buffering off;",
        "proxy_read_timeout 300s;",
    ]
    assert workspace("services.cachix-workspace.openFirewall = true;").ports == [8080]
    assert workspace().ports == [] and not workspace().nginx["enable"]
    with pytest.raises(Refused, match=r"nginx.domain' was accessed but has no value"):
        workspace("services.cachix-workspace.nginx.enable = true;")


POSTGRESQL = 'services.cachix-workspace.database.type = "postgresql";'
URL_FILE = 'services.cachix-workspace.database.urlFile = "/run/secrets/url";'
LOCAL = "services.cachix-workspace.database.createLocally = true;"


def test_a_database_on_this_machine():
    done = workspace(POSTGRESQL)
    postgresql = done.postgresql
    assert postgresql["enable"] and postgresql["ensureDatabases"] == ["cachix-workspace"]
    assert postgresql["ensureUsers"] == [{"name": "cachix-workspace", "ensureDBOwnership": True}]
    unit = done.units["cachix-workspace"]
    assert setting(unit, "User") == "cachix-workspace"  # the role: it comes by the socket, as peer
    assert "AF_UNIX" in re.findall("^RestrictAddressFamilies=(.*)$", unit, re.MULTILINE)
    assert setting(unit, "Requires") == "postgresql.service"
    after = (setting(unit, "After") or "").split()
    assert {"network-online.target", "postgresql.service", "postgresql.target"} <= set(after)
    url = "postgresql+psycopg://cachix-workspace@/cachix-workspace?host=/run/postgresql"
    assert f"--database={url}" in serve(done)
    assert setting(unit, "LoadCredential") is None


def test_a_database_by_the_url_in_a_file():
    done = workspace(POSTGRESQL, URL_FILE)
    assert not done.postgresql["enable"]
    unit = done.units["cachix-workspace"]
    assert setting(unit, "LoadCredential") == "database-url:/run/secrets/url"
    assert setting(unit, "Requires") is None
    assert not any("secrets" in word or "database" in word for word in serve(done))
    (script,) = done.scripts
    assert "--property=LoadCredential=database-url:/run/secrets/url" in script
    assert re.search(r"--setenv=PATH=/nix/store/\S+-postgresql/bin ", script)


def test_the_url_of_the_module_is_one_of_the_program(tmp_path):
    from cachix_workspace.cli import place, usage

    words = serve(workspace(POSTGRESQL))
    options = usage.parse(["serve", *words, f"--data={tmp_path}"])
    url, file = place.database_of(options)
    assert url.startswith("postgresql+psycopg://cachix-workspace@/") and file is None


@pytest.mark.parametrize(
    "settings", [[URL_FILE], [LOCAL], [POSTGRESQL, URL_FILE, LOCAL]], ids=["url", "local", "both"]
)
def test_databases_that_contradict_each_other(settings):
    (sentence,) = evaluate("nixos", WORKSPACE, *settings).failed
    assert "services.cachix-workspace.database" in sentence


def test_sqlite_is_the_default():
    done = workspace()
    assert not done.postgresql["enable"]
    assert not any("database" in word for word in serve(done))
    assert "PATH" not in done.scripts[0]


@pytest.mark.parametrize(
    "settings", ["port = 65536;", "maxConnections = 3;", "publicUrl = 1;", "data = { };"]
)
def test_wrong_options_of_the_workspace(settings):
    with pytest.raises(Refused, match="does not exist|is not of type"):
        workspace(f"services.cachix-workspace = {{ {settings} }};")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize(("port", "most"), [(8080, "1.5"), (80, "1.9")])
def test_the_workspace_is_hardly_exposed(tmp_path, port, most):
    path = tmp_path / "cachix-workspace.service"
    unit = workspace(f"services.cachix-workspace.port = {port};").units["cachix-workspace"]
    path.write_text(unit)
    argv = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    overall = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert overall, done.stdout + done.stderr
    assert float(overall[1]) <= float(most), done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may run such commands")
def test_commands_of_the_workspace_run_as_its_user(tmp_path):
    (script,) = workspace().scripts
    (tmp_path / "systemd-run").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "systemd-run").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    argv = ["sh", "-c", script, "cachix-workspace", "token", "create", "agent", "--name=a b"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=60)
    words = done.stdout.splitlines()
    assert words[-4:] == ["token", "create", "agent", "--name=a b"]
    assert {"--pipe", "--wait", "--property=User=cachix-workspace"} < set(words)
    unit = workspace().units["cachix-workspace"]
    for name in ("DynamicUser", "User", "StateDirectory", "StateDirectoryMode", "UMask"):
        value = {"true": "yes"}.get(str(setting(unit, name)), setting(unit, name))
        assert f"--property={name}={value}" in words
    # what needs no data needs no systemd either, and here there is no such program
    argv = ["sh", "-c", script, "cachix-workspace", "token", "list", "--url=https://x"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (127, "")


# --- packages, lib and the flake ------------------------------------------------------------------


def packages(attributes):
    """Attributes of the packages, with a `buildPythonApplication` that builds nothing."""
    return nix(
        f"let p = import ../default.nix {{ inherit ({world('nixos')}) pkgs; }}; in {attributes}"
    )


def test_the_packages(monkeypatch):
    import configparser

    from cachix_protocol import __version__

    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")

    def names(text):
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        return sorted(re.split(r"[ >=<\[]", line)[0] for line in lines)

    agents = names(setup["options"]["install_requires"])
    extras = setup["options.extras_require"]
    for_workspace = sum((names(extras[name]) for name in ("workspace", "postgresql", "s3")), [])
    for name in ("cachix-deploy", "cachix", "cachix-workspace"):
        package = packages(
            f"{{ inherit (p.{name}) pname version meta pyproject pythonImportsCheck postInstall;"
            f" needs = map (need: need.name) p.{name}.dependencies; }}"
        )
        assert (package["pname"], package["version"]) == (name, __version__)
        assert package["meta"]["mainProgram"] == name and package["pyproject"]
        assert f"! -name {name} -delete" in package["postInstall"]
        has_manual = f"contrib/man/{name}.1" in package["postInstall"]
        assert has_manual == (name != "cachix")
        wanted = agents + for_workspace if name == "cachix-workspace" else agents
        assert sorted(package["needs"]) == sorted(wanted)
        for module in package["pythonImportsCheck"]:
            __import__(module)
    assert packages("p.pname") == "cachix-deploy"  # what `nix-env -if` installs
    scripts = names(setup["options.entry_points"]["console_scripts"])
    assert scripts == ["cachix", "cachix-deploy", "cachix-workspace"]


@pytest.mark.skipif(
    bool(os.environ.get("NIXPKGS_LIB")), reason="the real one copies into the store"
)
def test_the_source_of_the_packages():
    files = {os.path.relpath(path, PROJECT) for path in packages("p.src.files")}
    modules = {path.name for path in PROJECT.glob("cachix_*.py")}
    folders = {"activate", "cachix_workspace"}
    assert modules | folders <= files
    others = files - modules - folders
    manuals = {"contrib/completions", "contrib/man"}
    assert others - manuals == {"setup.cfg", "setup.py", "pyproject.toml", "README.rst", "LICENSE"}
    assert manuals <= others


def spec(expression):
    """The deploy.json that `lib.spec` writes. Raises Refused."""
    library = "(import ../nix/lib.nix { agent = { nixos = ../nix/nixos.nix; }; }) w.pkgs"
    return json.loads(
        nix(f"let w = {world('nixos')}; l = {library}; in (l.spec {expression}).text")
    )


def test_lib_spec_writes_a_deploy_json():
    done = spec("{ agents.web = l.nixos { a = 1; }; rollbackScript.x86_64-linux = w.pkgs.cachix; }")
    assert set(done) == {"agents", "rollbackScript"} and set(done["agents"]) == {"web"}
    assert re.fullmatch("/nix/store/[0-9a-f]{32}-nixos", done["agents"]["web"])
    assert spec("{ agents = { }; }") == {"agents": {}}


@pytest.mark.parametrize(
    ("expression", "sentence"),
    [
        ("{ agents = { }; agnets = { }; }", "unknown keys: agnets"),
        ('{ agents."a b" = w.pkgs.nix; }', "agents can't have these names: a b"),
        ('{ agents.web = "/tmp/x"; }', "no store paths: web"),
        ("{ agents.web = l.darwin { }; }", "inputs.cachix-deploy.inputs.darwin.follows"),
        ("{ agents.web = l.homeManager { } { }; }", "inputs.cachix-deploy.inputs.home-manager"),
        ("{ }", "agents"),
    ],
)
def test_lib_spec_refuses(expression, sentence):
    with pytest.raises(Refused, match=re.escape(sentence)):
        spec(expression)


def test_a_deployed_system_contains_the_agent():
    """`lib.nixos` imports the module: the system must only enable it."""
    library = f"(import ../nix/lib.nix {{ agent.nixos = 1; }}) ({world('nixos')}).pkgs"
    assert nix(f"(({library}).nixos {{ a = 2; }}).configuration.imports") == [1, {"a": 2}]
