"""Write docs/options.rst: the options of the modules in nix/, from the modules themselves.

`make manuals` calls it. Nix evaluates them with the stand-in for nixpkgs' lib that the tests have.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from nixmodules import nix  # noqa: E402

TARGET = ROOT / "docs" / "options.rst"
# Title, kind of the system, file, and the name of the service.
MODULES = [
    ("services.cachix-deploy on NixOS", "nixos", "nixos.nix", "cachix-deploy"),
    ("services.cachix-deploy on nix-darwin", "darwin", "darwin.nix", "cachix-deploy"),
    ("services.cachix-deploy in home-manager", "home-manager", "home-manager.nix", "cachix-deploy"),
    ("services.cachix-workspace on NixOS", "nixos", "workspace.nix", "cachix-workspace"),
]
# The options of a module, flat: a list of {name, type, default, description}.
LIST = """
let
  world = import ./nixworld.nix {{ kind = "{kind}"; modules = [ ]; }};
  options = (import ../nix/{file} {{ inherit (world) config lib pkgs; }}).options.services.{name};
  shown = option:
    if option ? defaultText then option.defaultText.text or option.defaultText
    else if option ? default && option.type.name != "package" then builtins.toJSON option.default
    else null;
  flat = prefix: set: builtins.concatLists (map (key:
    let option = set.${{key}}; in
    if option._type or "" == "option" then [ {{
      name = prefix + key;
      type = option.type.name;
      default = shown option;
      description = option.description;
    }} ] else flat (prefix + key + ".") option
  ) (builtins.attrNames set));
in flat "" options
"""
HEAD = """\
The options of the modules
==========================

Made from ``nix/`` by ``make manuals``. The package is that of this flake by default.
"""


def options_of(kind: str, file: str, name: str) -> list[dict[str, Any]]:
    """The options of a module: name, type, default in Nix's words or null, description."""
    answer: list[dict[str, Any]] = nix(LIST.format(kind=kind, file=file, name=name))
    return answer


def entry(option: dict[str, Any]) -> str:
    """An option as reStructuredText."""
    facts = option["type"].replace("\\", "\\\\")
    if option["default"] is not None:
        facts += f"; by default ``{shortened(option['default'])}``"
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", " ".join(option["description"].split()))
    lines = [*textwrap.wrap(facts, 96), ""]
    body = textwrap.indent("\n".join([*lines, *textwrap.wrap(text, 96)]), "    ")
    return f"``{option['name']}``\n" + re.sub(r"[ ]+$", "", body, flags=re.M) + "\n"


def shortened(default: str) -> str:
    """A default on one line, as Nix writes it."""
    return "[ ]" if default == "[]" else " ".join(default.split())


def text() -> str:
    """The document."""
    parts = [HEAD]
    common: dict[str, str] = {}
    for title, kind, file, name in MODULES:
        parts.append(f"{title}\n{'-' * len(title)}\n")
        entries = {one["name"]: entry(one) for one in options_of(kind, file, name)}
        same = [key for key, value in entries.items() if common.get(key) == value]
        if same:
            names = ", ".join(f"``{key}``" for key in same)
            parts.append("\n".join(textwrap.wrap(f"As on NixOS: {names}. And:", 100)) + "\n")
        parts += [value for key, value in entries.items() if key not in same]
        common = common or entries
    return "\n".join(parts)


def main() -> int:
    """Write the document."""
    TARGET.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
