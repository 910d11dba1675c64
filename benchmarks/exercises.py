"""Blank out what a course would: `python benchmarks/exercises.py [FUNCTION ...]` checks the README's exercises.

In a copy of the program, one function of the table under "For courses" at a time becomes `raise NotImplementedError`,
as a student finds it, and the tests of all concepts in that table run. Tests of the function's own concepts must fail,
and so must some of each concept that needs it; those of all other concepts must pass. Prints which concepts fail.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_tests(file: str, content: str, *options: str) -> str:
    """What pytest prints in a copy of the repository in which this file has another content. mutants.py uses it too."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "benchmarks", Path(folder, "benchmarks"))
        for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
            shutil.copy(path, folder)
        Path(folder, file).write_text(content, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", "test_rar.py"]
        environment = os.environ | {"COLUMNS": "400"}  # so that pytest does not cut its lines
        return subprocess.run([*command, *options], cwd=folder, env=environment, capture_output=True, text=True).stdout


def read_table() -> dict[str, list[str]]:
    """Function -> concepts whose tests must fail without it: those of its `pytest -k` and those that need it."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("For courses")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)`[^|]*\| `[^`|]*-k ([^`|]*)` \|([^|]*)\|", section, re.MULTILINE)
    table = {}
    for function, tests, needed_by in rows:
        table[function] = [word for word in re.findall(r"\w+", f"{tests} {needed_by}") if word != "or"]
    return table


def blank(source: str, function: str) -> str:
    """The source without the body of a function, or of a method given as Class.name; its docstring stays."""
    node = ast.parse(source)
    for name in function.split("."):
        node = next((child for child in getattr(node, "body", []) if getattr(child, "name", "") == name), None)
    if node is None:
        return source
    body = node.body[ast.get_docstring(node) is not None :]
    lines = source.splitlines()
    lines[body[0].lineno - 1 : body[-1].end_lineno] = [" " * body[0].col_offset + "raise NotImplementedError"]
    return "\n".join(lines) + "\n"


def count_failures(function: str, concepts: list[str]) -> tuple[Counter, Counter]:
    """How many tests of each concept fail without this function, and how many there are."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}
    blanked = {name: blank(source, function) for name, source in sources.items()}
    file = next((name for name in sources if blanked[name] != sources[name]), None)
    if file is None:
        sys.exit(f"the program has no function {function}")
    output = run_tests(file, blanked[file], "-k", " or ".join(concepts))
    failed, total = Counter(), Counter()
    for outcome, test in re.findall(r"^(PASSED|FAILED|ERROR) \S+::test_(\w+)", output, re.MULTILINE):
        for concept in concepts:
            if test.startswith(concept):
                total[concept] += 1
                failed[concept] += outcome != "PASSED"
    return failed, total


def main():
    table = read_table()
    concepts = sorted({concept for row in table.values() for concept in row})
    problems = 0
    print("| blanked | failing tests | as the README says |\n|---|---|---|")
    for function in sys.argv[1:] or table:
        expected = table.get(function, [])
        failed, total = count_failures(function, concepts)
        found = [f"{c} {failed[c]} of {total[c]}" for c in concepts if failed[c]] if total else ["no test ran"]
        wrong = [f"{c} passes" for c in expected if not failed[c]]
        wrong += [f"{c} fails" for c in concepts if failed[c] and c not in expected]
        print(f"| `{function}` | {', '.join(found)} | {', '.join(wrong) or 'yes'} |", flush=True)
        problems += len(wrong)
    sys.exit(problems > 0 or not table)


if __name__ == "__main__":
    main()
