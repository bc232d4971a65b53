"""Tests of commands, programs and links in the READMEs and docs/."""

import ast
import configparser
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from mini_runs import ROOT

from hivit_jax import config, main
from hivit_jax.errors import HivitError

PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *ROOT.glob("docs/*.md")]
# Modules of other packages, whose flags are not checked.
FOREIGN = {"pytest"}


def blocks(path, *languages):
    """Return the code blocks of a page in one of the languages."""
    code_blocks = re.findall(r"(?ms)^```(\w+)\n(.*?)^```", path.read_text())
    return [text for language, text in code_blocks if language in languages]


def commands(path):
    """Return the shell commands of a page, each a list of words."""
    text = "\n".join(blocks(path, "sh", "bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.split("\n")]
    return [
        [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)]
        for words in lines
        if words
    ]


def check_run(words):
    """Raise an error if a flag is invalid, or a recipe of configs/ cannot be loaded."""
    if "--help" in words:
        return
    flags, overrides = main.parse(words)
    name = Path(flags.config).name
    if not Path(flags.config).suffix or (ROOT / "configs" / name).exists():
        config.load(flags.config, overrides)


def check_module(name, words):
    """Raise an error unless a module exists and contains the flags."""
    spec = find_spec(name)
    assert spec, f"no module {name}"
    if name.split(".")[0] not in FOREIGN:
        check_flags(Path(spec.origin), words)


def check_flags(path, words):
    """Check that the text of a program contains the names of its flags.

    Flags ``--config...`` and flags after ``--`` are not checked.
    """
    text = path.read_text()
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    # Flags after "--" belong to the command that a script starts.
    flags = flags[: flags.index("--")] if "--" in flags else flags
    missing = [f for f in flags if not f.startswith("--config") and f not in text]
    assert not missing, f"{path} has no {missing}"


def check_install(words):
    """Raise an error if a pip command names an extra that does not exist."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extra.split(",")) <= {*setup["options.extras_require"]}, extra


def check_command(words):
    """Raise an error if a command names a missing program, file, flag or target."""
    program, *arguments = words
    if program == "hivit_jax":
        check_run(arguments)
    elif arguments[:2] == ["-m", "hivit_jax.main"]:
        check_run(arguments[2:])
    elif arguments[:1] == ["-m"]:
        check_module(arguments[1], arguments[2:])
    elif program == "pip":
        check_install(arguments)
    elif program == "make":
        assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()
    elif program == "python":
        assert (ROOT / arguments[0]).exists(), arguments[0]
        check_flags(ROOT / arguments[0], arguments)
    elif "/" in program:
        assert (ROOT / program).exists(), program
    else:
        assert program in {"sbatch", "docker", "kubectl", "export"}, program


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_are_valid(path, tmp_path, monkeypatch):
    """Programs, recipes and flags exist, and the recipes accept the overrides."""
    monkeypatch.chdir(ROOT)
    for words in commands(path):
        if "--workdir" in words and "--config" not in words:
            continue  # because the command reads the config of an earlier run
        try:
            check_command(words)
        except (AssertionError, HivitError, SystemExit) as error:
            pytest.fail(f"{path.name}: {shlex.join(words)}\n{error}")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_python_code_parses(path):
    for text in blocks(path, "python"):
        ast.parse(text)


def anchors(path):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.*)$", path.read_text())
    return {
        re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_linked_files_and_headings_exist(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            linked = path.parent / file if file else path
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def test_every_page_is_linked_from_the_readme():
    """All pages of docs/ except index.md, the site's front page, are linked.

    The site's menu (mkdocs.yml) lists all of them.
    """
    text, site = (ROOT / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    names = {path.name for path in PAGES[2:]}
    assert {name for name in names if f"(docs/{name})" not in text} == {"index.md"}
    assert {name for name in names if f" {name}\n" not in site} == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_begins_with_a_title_and_a_sentence(path):
    """The first paragraph is not code, a table or an image."""
    title, blank, first = path.read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert not blank
    assert re.match(r"[A-Za-z]|`[^`]", first)


def test_readme_has_at_most_150_lines_and_12_kb():
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 12_000
    assert text.count(b"\n") <= 150
