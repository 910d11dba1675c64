"""What a course would blank out: `python benchmarks/exercises.py [FUNCTION ...]` empties the functions of the README.

One function of its exercises table at a time becomes `raise NotImplementedError` in a copy of the program, as a student
finds it. Its own tests must then fail, with that line of that function in their traceback; so may the tests of concepts
that the table says need it; all others must pass. Prints functions against concepts: how many tests of each fail.
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
PROGRAM = ("rar.py", "tokenizer.py", "train_tiny.py")


def read_table() -> dict[str, tuple[list[str], list[str]]]:
    """Function -> the concepts whose tests are its own, and those that need it, from the README's exercises."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Exercises")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)`[^|]*\| `-k \"?([^`\"]*)\"?` \|([^|]*)\|", section, re.MULTILINE)
    own = {function: re.findall(r"test_(\w+)", tests) for function, tests, _ in rows}
    return {function: (own[function], re.findall(r"\w+", needed_by)) for function, _, needed_by in rows}


def blank(source: str, function: str) -> str:
    """The source with the body of a function, or of a method as Class.name, raised away; its docstring stays."""
    node = ast.parse(source)
    for name in function.split("."):
        node = next((n for n in getattr(node, "body", ()) if getattr(n, "name", "") == name), None)
    if node is None:
        return source
    body = node.body[ast.get_docstring(node) is not None :]
    lines = source.splitlines(keepends=True)
    lines[body[0].lineno - 1 : body[-1].end_lineno] = [" " * body[0].col_offset + "raise NotImplementedError\n"]
    return "".join(lines)


def run_tests(function: str | None, concepts: list[str]) -> tuple[Counter, Counter, str]:
    """Blank a function (None: nothing) in a copy and test it there: failures and tests by concept, and the output."""
    with tempfile.TemporaryDirectory() as folder:
        copy, changed = Path(folder), 0
        shutil.copytree(ROOT / "benchmarks", copy / "benchmarks")
        for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
            source = file.read_text(encoding="utf-8")
            content = blank(source, function) if function and file.name in PROGRAM else source
            changed += content != source
            (copy / file.name).write_text(content, encoding="utf-8")
        if changed != bool(function):
            raise SystemExit(f"{function}: {changed} functions of this name")
        words = " or ".join(f"test_{concept}" for concept in concepts)
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rA", "-p", "no:cacheprovider", "-k", words]
        environment = os.environ | {"COLUMNS": "400"}  # so that no line of the summary is cut
        done = subprocess.run([*command, "test_rar.py"], cwd=copy, env=environment, capture_output=True, text=True)
    if " passed" not in done.stdout.splitlines()[-1]:
        raise SystemExit(f"{function}: no test passes, so nothing is learnt\n{done.stdout[-2000:]}")
    failed, tests = Counter(), Counter()
    for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR) \S+::test_(\w+)", done.stdout, re.MULTILINE):
        concept = max((c for c in concepts if name.startswith(c)), key=len)
        tests[concept] += 1
        failed[concept] += outcome != "PASSED"
    return failed, tests, done.stdout


def problems(function: str, own: list[str], needed_by: list[str], failed: Counter, output: str) -> list[str]:
    """What is not as the table says."""
    found = [f"{c}, which is its own, passes" for c in own if not failed[c]]
    found += [f"{c}, which needs it, passes" for c in needed_by if not failed[c]]
    found += [f"{c}, which does not need it, fails" for c in failed if failed[c] and c not in own + needed_by]
    if not re.search(rf"in {function.split('.')[-1]}\n\s+raise NotImplementedError", output):
        found.append("its tests do not show where to write")
    other = re.findall(r"^(?:FAILED|ERROR) \S+::(.*) - (?!NotImplementedError)", output, re.MULTILINE)
    return found + [f"{name} fails otherwise" for name in other]


def main() -> None:
    table = read_table()
    concepts = [concept for own, _ in table.values() for concept in own]
    wrong = []
    print("| blanked | " + " | ".join(concepts) + " |\n" + "|---" * (len(concepts) + 1) + "|")
    for function in sys.argv[1:] or [None, *table]:
        failed, tests, output = run_tests(function, concepts)
        cells = [f"{failed[c]} of {tests[c]}" if failed[c] else "-" for c in concepts]
        print(f"| {function or 'nothing'} | " + " | ".join(cells) + " |", flush=True)
        expected = table.get(function, ([], []))
        found = problems(function, *expected, failed, output) if function else [c for c in concepts if failed[c]]
        wrong += [f"{function}: {problem}" for problem in found]
    print("\n".join(wrong) if wrong else "\nas the table says")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
