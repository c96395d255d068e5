"""The pages do what they say: Python blocks run, commands exist, links lead somewhere.

A page's Python blocks run in their order, in one interpreter of their own. In the source of a page, comments that
readers do not see say more of a block::

    <!-- compiled only: needs a cluster elsewhere -->      the next block is not run
    <!-- python                                            run like a block: data for a fragment, or a check
    X, y = ...
    -->
"""

import argparse
import ast
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import joblib
import pytest

from joblib_backends import config
from joblib_backends.command_line import parser

ROOT = Path(__file__).resolve().parent.parent
LONG = 120

#: Every page that people read, by its path; those of ``docs/`` and the README have code to run.
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for folder in (".", "docs", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.md"))
}
WITH_CODE = [name for name in PAGES if not name.startswith("benchmarks")]

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|:{3,})(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)(?P=fence)[`:]* *$"
    r"|^<!-- python\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
COMPILED_ONLY = re.compile(r"<!-- compiled only: [^\n]+ -->\s*\Z")


def blocks(page):
    """Return (line, language, code, whether it runs) of each block of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        start = match.start("code") if match["hidden"] is None else match.start("hidden")
        code = textwrap.dedent(match["code"] if match["hidden"] is None else match["hidden"])
        language = "python" if match["hidden"] is not None else match["language"].strip()
        runs = not COMPILED_ONLY.search(text, 0, match.start())
        found.append((text.count("\n", 0, start) + 1, language, code, runs))
    return found


def program_of(page):
    """Return the blocks that run as one program, in which each has the lines that it has in the page."""
    program = ""
    for line, language, code, runs in blocks(page):
        if language == "python" and runs:
            program += "\n" * (line - 1 - program.count("\n")) + code
    return program


def of_language(language):
    return [
        pytest.param(code, id=f"{name}:{line}")
        for name in WITH_CODE
        for line, found, code, _ in blocks(PAGES[name])
        if found == language
    ]


# ---- Python


@pytest.mark.skipif(joblib.cpu_count() < 2, reason="on one core n_jobs=-1 is a plain loop, which leaves no report")
@pytest.mark.parametrize("name", [name for name in WITH_CODE if program_of(PAGES[name])])
def test_the_python_blocks_of_a_page_run(name, tmp_path):
    pytest.importorskip("sklearn", reason="the extra 'sklearn' is not installed")
    pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
    script = tmp_path / f"{Path(name).stem.replace('-', '_').lower()}.py"
    script.write_text(program_of(PAGES[name]), encoding="utf-8")
    variables = {name: text for name, text in os.environ.items() if not name.startswith("JOBLIB")}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", script],
        env={**variables, "JOBLIB_BACKEND_PROFILE": "off"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LONG,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"The lines are those of {name}:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("code", of_language("python"))
def test_each_python_block_is_python(code):
    ast.parse(code)


# ---- commands


@pytest.mark.parametrize("code", of_language("bash"))
def test_each_bash_block_is_bash_and_its_commands_of_ours_exist(code):
    subprocess.run(["bash", "-n"], input=code, text=True, check=True, timeout=LONG, capture_output=True)
    for words in commands_of_ours(code):
        parser().parse_args(words)  # exits with 2 for what does not exist


def commands_of_ours(code):
    """Return the arguments of each ``python -m joblib_backends`` in a block."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|\|\||[|;>]", line):
            words = shlex.split(command, comments=True)
            if "joblib_backends" in words[:-1] and words[words.index("joblib_backends") - 1] == "-m":
                found.append(words[words.index("joblib_backends") + 1 :])
    return found


def test_commands_of_ours_are_found():
    code = "A=1 python -m joblib_backends info --json > info.json && python -m joblib_backends run train.py  # all\n"
    assert commands_of_ours(code) == [["info", "--json"], ["run", "train.py"]]


def test_pages_name_no_variable_that_is_not_there():
    known = {f"JOBLIB_BACKEND_{name}" for name in (*map(str.upper, config._READERS), *config._NOT_PARAMETERS)}
    for name, page in PAGES.items():
        named = set(re.findall(r"JOBLIB_BACKEND_[A-Z][A-Z_]*", page.read_text(encoding="utf-8")))
        # A family of them, as in JOBLIB_BACKEND_<PARAMETER>, ends where the brackets begin.
        assert {variable for variable in named if not variable.endswith("_")} - known == set(), name


def test_the_reference_names_every_variable():
    text = PAGES["docs/reference.md"].read_text(encoding="utf-8")
    missing = [
        name
        for name in (*map(str.upper, config._READERS), *config._NOT_PARAMETERS)
        if f"`JOBLIB_BACKEND_{name}`" not in text
    ]
    assert missing == []


def test_the_reference_names_every_public_name():
    import joblib_backends

    text = PAGES["docs/reference.md"].read_text(encoding="utf-8")
    assert [name for name in joblib_backends.__all__ if not re.search(rf"joblib_backends[.\w]*\.{name}\b", text)] == []


def commands_and_options(parsers=None, command=""):
    """Yield each command, and each option that its help shows."""
    for action in (parsers or parser())._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from commands_and_options(below, f"{command} {name}".strip())
        elif action.option_strings and action.help != argparse.SUPPRESS:
            yield command, action.option_strings[-1]


def test_the_reference_names_every_command_and_option():
    lines = re.findall(r"^\| `(.+?)` \|", PAGES["docs/reference.md"].read_text(encoding="utf-8"), re.MULTILINE)
    for command, option in commands_and_options():
        of_command = [line for line in lines if line.startswith(command)]
        assert of_command, command
        assert option == "--help" or any(option in line for line in of_command), (command, option)


def test_the_saved_curves_are_the_planners(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import curves

    calls = curves.predicted_and_measured(json.loads((curves.RESULTS / "auto.json").read_text(encoding="utf-8")))
    # python benchmarks/curves.py --save, and the tables of docs/how-it-decides.md
    assert (curves.RESULTS / "curves.md").read_text(encoding="utf-8") == curves.report(calls)


# ---- links


def prose_of(page):
    """Return a page without its blocks of code and inline code."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors_of(page):
    """Return what a link can name in a page: headings as GitHub and MyST spell them, and explicit targets."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("", text), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = PAGES[name]
    dead = []
    for target in re.findall(r"\]\(<?([^)>\s]+)>?\)", prose_of(page)):
        link = urlsplit(target)
        if link.scheme:
            continue
        there = (page.parent / unquote(link.path)).resolve() if link.path else page
        if not there.exists() or (link.fragment and link.fragment not in anchors_of(there)):
            dead.append(target)
    assert dead == []


def test_every_page_of_the_site_is_in_its_table_of_contents():
    listed = re.findall(
        r"^([\w-]+)$",
        "".join(c for _, language, c, _ in blocks(PAGES["docs/index.md"]) if language == "{toctree}"),
        re.MULTILINE,
    )
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "docs").glob("*.md") if path.stem != "index")


def test_no_page_has_the_name_of_one_that_sphinx_makes():
    # Sphinx writes its own over it, and says nothing.
    made = {"search", "genindex", "py-modindex"}
    assert made.isdisjoint(path.stem for path in (ROOT / "docs").glob("*.md"))


def test_what_builds_the_site_is_in_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    settings = (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
    needed = {"sphinx", "furo", *("myst-parser", "numpydoc", "sphinx-copybutton")}
    for name in needed:
        assert name in {re.match(r"[\w-]+", requirement)[0] for requirement in extras["docs"]}
        assert name == "sphinx" or name.replace("-", "_") in settings
