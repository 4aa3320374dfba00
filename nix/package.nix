# One of the programs: `cachix-deploy` (agent and CI command), `cachix` (the same by the name that
# Cachix's modules call) or `cachix-workspace`.
{
  lib,
  installShellFiles,
  python3Packages,
  program ? "cachix-deploy",
}:

let
  inherit (lib) fileset;
  source = ../.;
  modules = builtins.filter (name: builtins.match "cachix_[a-z0-9_]+\\.py" name != null) (
    builtins.attrNames (builtins.readDir source)
  );
  packageFiles = fileset.fileFilter (file: !lib.hasSuffix ".pyc" file.name);
  version = builtins.head (
    builtins.match ".*\n__version__ = \"([^\"]+)\".*" (builtins.readFile ../cachix_protocol.py)
  );
  needs = {
    agent = with python3Packages; [
      docopt
      requests
      websocket-client
    ];
    workspace = with python3Packages; [
      alembic
      ansi2html
      boto3
      cryptography
      flask
      flask-smorest
      flask-wtf
      gunicorn
      prometheus-client
      psycopg
      sqlalchemy
      wsproto
    ];
  };
  isWorkspace = program == "cachix-workspace";
in
python3Packages.buildPythonApplication {
  pname = program;
  inherit version;
  pyproject = true;

  src = fileset.toSource {
    root = source;
    fileset = fileset.unions (
      [
        ../LICENSE
        ../README.rst
        ../pyproject.toml
        ../setup.cfg
        ../setup.py
        (packageFiles ../activate)
        (packageFiles ../cachix_workspace)
        ../contrib/completions
        ../contrib/man
      ]
      ++ map (name: source + "/${name}") modules
    );
  };

  build-system = [ python3Packages.setuptools ];
  dependencies = needs.agent ++ lib.optionals isWorkspace needs.workspace;

  nativeBuildInputs = [ installShellFiles ];

  # Our floors are for pip, which takes the newest releases. nixpkgs mends holes in the ones it has.
  pythonRelaxDeps = true;
  pypaBuildFlags = [ "--skip-dependency-check" ];

  # All three are in one source. A second bin/cachix would collide with that of pkgs.cachix.
  postInstall = ''
    find "$out/bin" -type f ! -name ${program} -delete
  ''
  + lib.optionalString (program != "cachix") ''
    installManPage contrib/man/${program}.1
    installShellCompletion contrib/completions/{${program}.bash,${program}.fish,_${program}}
  '';

  pythonImportsCheck = [ (if isWorkspace then "cachix_workspace.app" else "cachix_deploy") ];
  doCheck = false; # the tests need root, Nix and namespaces: see `make test`

  meta = {
    description =
      if isWorkspace then
        "Self-hosted workspace of Cachix Deploy"
      else
        "Continuous deployment of Nix profiles: agents that pull, and the command for CI";
    license = lib.licenses.asl20;
    platforms = lib.platforms.unix;
    mainProgram = program;
  };
}
