"""Blank out what a course would: `python benchmarks/exercises.py [FUNCTION ...]` checks the README's exercises.

In a copy of the program, one function of the table under "For courses" at a time becomes `raise NotImplementedError`,
as a student finds it. Its own tests run, of which some must fail. Prints how many do.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
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


def read_table() -> dict[str, str]:
    """Function -> what selects its tests, as the README's table under "For courses" says."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("For courses")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([\w.]+)`[^|]*\| `-k \"?([^`|\"]*)\"?` \|", section, re.MULTILINE))


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


def count_failures(function: str, tests: str) -> tuple[int, int]:
    """How many of a function's own tests fail without it, and how many there are."""
    for path in ROOT.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        blanked = blank(source, function)
        if blanked != source:
            output = run_tests(path.name, blanked, "-k", tests)
            outcomes = re.findall(r"^(PASSED|FAILED|ERROR) \S+::", output, re.MULTILINE)
            return len(outcomes) - outcomes.count("PASSED"), len(outcomes)
    sys.exit(f"the program has no function {function}")


def main():
    table = read_table()
    problems = 0
    print("| blanked | its tests | fail |\n|---|---|---|")
    for function in sys.argv[1:] or table:
        failed, total = count_failures(function, table[function])
        print(f'| `{function}` | `-k "{table[function]}"` | {failed} of {total} |', flush=True)
        problems += failed == 0
    sys.exit(problems > 0 or not table)


if __name__ == "__main__":
    main()
