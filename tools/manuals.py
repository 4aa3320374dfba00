"""Write the completions for bash, zsh and fish, and the man pages, from the usage texts.

`make manuals` calls it. The files are committed, as packages are made without docopt's help.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import docopt

import cachix_options
from cachix_workspace.cli import usage

ROOT = Path(__file__).resolve().parent.parent
# The values of options that take one of a few words.
CHOICES = {
    "--format": "json slack ntfy",
    "--offline": "wait skip fail",
    "--on-reboot-needed": "fail boot",
    "--on-unit-failure": "rollback tolerate",
    "--role": "viewer operator admin",
    "--unknown": "fail skip",
}
FILES = ("FILE", "SPEC", "PATH")
DIRECTORIES = ("DIR",)


@dataclass(frozen=True)
class Option:
    """An option: its names, the name of its value, and its text. `values` is for completion."""

    names: tuple[str, ...]
    metavar: str
    text: str

    @property
    def long(self) -> str:
        """Its name in full."""
        return self.names[-1]

    @property
    def values(self) -> str:
        """`files`, `directories`, words to choose from, or nothing."""
        if self.metavar in (*FILES, *DIRECTORIES):
            return "files" if self.metavar in FILES else "directories"
        return CHOICES.get(self.long, "")

    @property
    def brief(self) -> str:
        """Its text in one sentence."""
        return brief(self.text)


@dataclass
class Form:
    """A command: its words, its options, and the names of its arguments."""

    words: tuple[str, ...]
    options: list[str]
    arguments: list[str]


@dataclass(frozen=True)
class Program:
    """A program as its usage text describes it."""

    name: str
    summary: str
    usage: str
    options: dict[str, Option]
    shared: set[str]
    forms: list[Form]

    def following(self, words: tuple[str, ...]) -> list[str]:
        """The commands that may follow these words."""
        longer = (form.words for form in self.forms if form.words[: len(words)] == words)
        return list(dict.fromkeys(each[len(words)] for each in longer if len(each) > len(words)))

    def paths(self) -> list[tuple[str, ...]]:
        """All beginnings of commands, the empty one first."""
        starts = (form.words[:end] for form in self.forms for end in range(len(form.words) + 1))
        return sorted(dict.fromkeys(starts))

    def options_of(self, words: tuple[str, ...]) -> list[Option]:
        """The options that may stand with a command; without one those that stand before all."""
        names = {name for form in self.forms if form.words == words for name in form.options}
        return [self.options[name] for name in sorted(names | (set() if words else self.shared))]

    def uses(self) -> list[tuple[Option, list[tuple[str, ...]]]]:
        """Each option, with the commands that take it."""
        by_name: dict[str, list[tuple[str, ...]]] = {}
        for path in self.paths():
            for option in self.options_of(path):
                by_name.setdefault(option.long, []).append(path)
        return [(self.options[name], paths) for name, paths in sorted(by_name.items())]

    def takes_files(self, words: tuple[str, ...]) -> bool:
        """Whether an argument of the command is a file."""
        arguments = (form.arguments for form in self.forms if form.words == words)
        return any(name in FILES for names in arguments for name in names)


def brief(text: str) -> str:
    """The first sentence of a text, without characters that shells would read."""
    return re.sub(r"[\[\]'`:\\$\"]", "", re.split(r"(?<=[a-z)])[.;:] ", text)[0]).rstrip(".")


# --- reading the usage text -----------------------------------------------------------------------


def read(name: str, text: str) -> Program:
    """The program of a usage text."""
    summary = " ".join(text.partition("\n\n")[0].split())
    entries = section(text, "Options")
    options = {}
    for head, explanation in entries:
        names = tuple(re.findall(r"--?[a-z][a-z-]*", head))
        metavar = head.partition("=")[2]
        options[names[-1]] = Option(names, metavar, explanation)
    known = docopt.parse_defaults(text)
    pattern = docopt.parse_pattern(docopt.formal_usage(docopt.printable_usage(text)), known)
    shared = {option.name for option in known} - {one.name for one in pattern.flat(docopt.Option)}
    forms: dict[tuple[str, ...], Form] = {}
    for words, flags, arguments in expand(pattern, shared):
        form = forms.setdefault(words, Form(words, [], []))
        form.options += [flag for flag in flags if flag not in form.options]
        form.arguments += [each for each in arguments if each not in form.arguments]
    return Program(name, summary, text, options, shared, list(forms.values()))


def section(text: str, title: str) -> list[tuple[str, str]]:
    """The entries below a title: each with its head and its text in one line."""
    entries: list[tuple[str, str]] = []
    for line in text.partition(f"\n{title}:\n")[2].partition("\n\n")[0].splitlines():
        match = re.match(r"  (\S.*?)(?:  +(.*))?$", line)
        if match:
            entries.append((match[1], match[2] or ""))
        else:
            head, explanation = entries[-1]
            entries[-1] = head, f"{explanation} {line.strip()}"
    return entries


Expansion = tuple[tuple[str, ...], list[str], list[str]]


def expand(pattern: docopt.Pattern, shared: set[str]) -> list[Expansion]:
    """The words, options and arguments of each command that a pattern stands for."""
    if isinstance(pattern, docopt.Command):
        return [((pattern.name,), [], [])]
    if isinstance(pattern, docopt.Argument):
        return [((), [], [pattern.name])]
    if isinstance(pattern, docopt.Option):
        return [((), [pattern.name], [])]
    if isinstance(pattern, docopt.AnyOptions):
        return [((), sorted(shared), [])]
    if isinstance(pattern, docopt.Either):
        parts = [each for child in pattern.children for each in expand(child, shared)]
        return parts if any(words for words, _, _ in parts) else [merged(parts)]
    results: list[Expansion] = [((), [], [])]
    for child in pattern.children:
        parts = expand(child, shared)
        if isinstance(pattern, docopt.Optional) and any(words for words, _, _ in parts):
            parts = [((), [], []), *parts]
        results = [(a[0] + b[0], [*a[1], *b[1]], [*a[2], *b[2]]) for a in results for b in parts]
    return results


def merged(parts: list[Expansion]) -> Expansion:
    """Parts without commands, of which one may stand there, as one."""
    return (
        (),
        [o for _, options, _ in parts for o in options],
        [a for *_, args in parts for a in args],
    )


# --- completions ----------------------------------------------------------------------------------


def words_loop(program: Program, function: str) -> str:
    """The patterns of a shell's `case` that know the beginnings of commands."""
    return "|".join(f'"{" ".join(path)}"' for path in program.paths() if path)


def bash(program: Program) -> str:
    """The completion for bash."""
    function = "_" + program.name.replace("-", "_")
    lines = [
        f"# bash completion of {program.name}, made by tools/manuals.py",
        f"{function}() {{",
        "  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} path= word i",
        "  # bash splits --option=value into three words",
        "  if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then",
        "    prev=${COMP_WORDS[COMP_CWORD-2]}",
        "  fi",
        "  COMPREPLY=()",
        "  case $prev in",
        *(f"    {line}" for line in _bash_values(program)),
        "  esac",
        "  for ((i = 1; i < COMP_CWORD; i++)); do",
        "    word=${path:+$path }${COMP_WORDS[i]}",
        f"    case $word in {words_loop(program, function)}) path=$word ;; esac",
        "  done",
        "  local words= files=",
        "  case $path in",
    ]
    for path in program.paths():
        words = " ".join([*program.following(path), *map(_with_equals, program.options_of(path))])
        files = " files=1" if program.takes_files(path) else ""
        lines.append(f'    "{" ".join(path)}") words="{words}"{files} ;;')
    lines += [
        "  esac",
        '  COMPREPLY=($(compgen -W "$words" -- "$cur"))',
        "  [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace",
        "  if [[ $files && $cur != -* ]]; then",
        '    compopt -o filenames; COMPREPLY+=($(compgen -f -- "$cur"))',
        "  fi",
        "  return 0",
        "}",
        f"complete -F {function} {program.name}",
    ]
    return "\n".join(lines) + "\n"


def _with_equals(option: Option) -> str:
    return option.long + ("=" if option.metavar else "")


def _bash_values(program: Program) -> Iterator[str]:
    for option in program.options.values():
        if option.metavar:
            how = {
                "files": 'compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur"))',
                "directories": 'compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur"))',
                "": ":",
            }.get(option.values, f'COMPREPLY=($(compgen -W "{option.values}" -- "$cur"))')
            yield f"{'|'.join(option.names)}) {how}; return ;;"


def zsh(program: Program) -> str:
    """The completion for zsh."""
    lines = [
        f"#compdef {program.name}",
        "# made by tools/manuals.py",
        "local command= word",
        "integer i",
        "for ((i = 2; i < CURRENT; i++)); do",
        '  word="${command:+$command }${words[i]}"',
        f'  case "$word" in {words_loop(program, "")}) command="$word" ;; esac',
        "done",
        "local -a commands options",
        "local files=",
        'case "$command" in',
    ]
    texts = dict(section(program.usage, "Commands"))
    for path in program.paths():
        commands = [f"'{each}:{_brief(texts, (*path, each))}'" for each in program.following(path)]
        files = " files=1" if program.takes_files(path) else ""
        lines.append(f"""  "{" ".join(path)}") commands=({" ".join(commands)}){files} ;;""")
    lines.append("esac")
    for option, paths in program.uses():
        words = "|".join('"' + " ".join(path) + '"' for path in paths)
        lines.append(f'case "$command" in {words}) options+=({_zsh_option(option)}) ;; esac')
    lines += [
        'if [[ "${words[CURRENT]}" == -* ]]; then',
        "  _arguments -S $options",
        "else",
        "  (( $#commands )) && _describe command commands",
        "  [[ -n $files ]] && _files",
        "fi",
    ]
    return "\n".join(lines) + "\n"


def _brief(texts: dict[str, str], path: tuple[str, ...]) -> str:
    """The text of a command, of its own or of its group's."""
    return brief(texts.get(" ".join(path)) or (texts.get(path[-1], "") if len(path) == 1 else ""))


def _zsh_option(option: Option) -> str:
    if not option.metavar:
        return f"'{option.long}[{option.brief}]'"
    action = {"files": "_files", "directories": "_files -/", "": " "}.get(
        option.values, f"({option.values})"
    )
    return f"'*{option.long}=[{option.brief}]:{option.metavar}:{action}'"


def fish(program: Program) -> str:
    """The completion for fish."""
    function = "__" + program.name.replace("-", "_")
    lines = [
        f"# fish completion of {program.name}, made by tools/manuals.py",
        f"function {function}",
        "    set -l command",
        "    for word in (commandline -opc)[2..-1]",
        '        set -l longer (string join " " $command $word)',
        "        switch $longer",
        f"            case {' '.join(repr(' '.join(path)) for path in program.paths() if path)}",
        "                set command $command $word",
        "        end",
        "    end",
        '    set -l joined (string join " " $command)',
        '    contains -- "$joined" $argv',
        "end",
        f"complete -c {program.name} -f",
    ]
    texts = dict(section(program.usage, "Commands"))
    for path in program.paths():
        test = f"-n '{function} \"{' '.join(path)}\"'"
        start = f"complete -c {program.name} {test}"
        for each in program.following(path):
            lines.append(f"{start} -a {each} -d '{_brief(texts, (*path, each))}'")
        lines += [f"{start} -F"] if program.takes_files(path) else []
    for option, paths in program.uses():
        words = " ".join('"' + " ".join(path) + '"' for path in paths)
        lines.append(f"complete -c {program.name} -n '{function} {words}' {_fish_option(option)}")
    return "\n".join(lines) + "\n"


def _fish_option(option: Option) -> str:
    short = "".join(f" -s {name[1:]}" for name in option.names if not name.startswith("--"))
    value = {"files": " -r -F", "directories": " -x -a '(__fish_complete_directories)'", "": " -x"}
    takes = value.get(option.values, f" -x -a '{option.values}'") if option.metavar else ""
    return f"-l {option.long[2:]}{short}{takes} -d '{option.brief}'"


# --- man pages ------------------------------------------------------------------------------------


def roff(text: str) -> str:
    """Text as roff reads it."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped, flags=re.M)


def man(program: Program) -> str:
    """The man page."""
    synopsis = docopt.printable_usage(program.usage).partition("\n")[2]
    lines = [
        f'.TH {program.name.upper().replace("-", chr(92) + "-")} 1 "" "cachix\\-deploy"',
        ".SH NAME",
        f"{roff(program.name)} \\- {roff(program.summary.rstrip('.'))}",
        ".SH SYNOPSIS",
        ".nf",
        *(roff(line) for line in synopsis.splitlines()),
        ".fi",
    ]
    for title in ("Commands", "Options"):
        lines.append(f".SH {title.upper()}")
        for head, text in section(program.usage, title):
            lines += [".TP", f"\\fB{roff(head)}\\fR", roff(text.strip())]
    tail = re.search(r"Exit status: (.*)", program.usage, re.S)
    assert tail, f"{program.name} has no exit status in its usage text"
    lines.append(".SH EXIT STATUS")
    for number, meaning in re.findall(r"(\d+) ([^;]+?)(?:;|\.\s*$)", " ".join(tail[1].split())):
        lines += [".TP", f"\\fB{number}\\fR", roff(meaning)]
    return "\n".join(lines) + "\n"


def files() -> dict[Path, str]:
    """All files, with their contents."""
    contrib, contents = ROOT / "contrib", {}
    for name, text in (("cachix-deploy", cachix_options.USAGE), ("cachix-workspace", usage.USAGE)):
        program = read(name, text)
        contents[contrib / "completions" / f"{name}.bash"] = bash(program)
        contents[contrib / "completions" / f"_{name}"] = zsh(program)
        contents[contrib / "completions" / f"{name}.fish"] = fish(program)
        contents[contrib / "man" / f"{name}.1"] = man(program)
    return contents


def main() -> int:
    """Write the files."""
    for path, content in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
