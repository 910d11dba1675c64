"""Exercises for a course: `python benchmarks/exercises.py`, with --handout or --grade. The README has the table.

An exercise is a function without its docstring, or in a function with the comment lines `# exercise: ...` and `# end of
exercise` what stands between them. A handout has `raise NotImplementedError` there. Grading puts the statements that a
student has there, and nothing else, into this program, in a copy for each exercise, and runs the exercise's own tests:
all must pass for its points. Without an option, checks that the tests of each exercise fail while it is blank.

What good answers to the questions in handout.md show:

1. Losses in both orders. By the chain rule, an ideal model needs as many nats in any order, and while r is 1 the
   fixed order is trained no more than others. When r falls, ever more images come in the fixed order, and what the
   model knew of the others is overwritten.
2. 6 and 48 passes. Few passes do not suffice for all orders. In many, raster order learns the images by heart, while
   a new order makes a new task of the same image. Copies lie close to real images, so FD rewards them.
3. Eq. 4. While r is above 0, the same beginning has different next positions (Fig. 3b), and a model that is not told
   can only predict their mixture. In a single order the number of tokens so far says which position is next.
4. Completions. What is known must be the beginning of an order. rar.pt has forgotten all orders but one, in which
   the upper half comes first.
5. Guidance. Without it some samples are odd; with much of it all are typical and alike. FD compares means and
   covariances, so it grows at both ends.
"""

import argparse
import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from textwrap import indent

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ("rar.py", "tokenizer.py", "train_tiny.py", "sample.py")
MARKS = ("# exercise:", "# end of exercise")
LIMIT = 60  # seconds for the tests of an exercise, which take 2 to 6 on a free core


def run_tests(file: str, content: str, *options: str, limit: float | None = None) -> str:
    """What pytest prints in a copy of the repository in which this file has another content. mutants.py uses it too.

    Tests that have not ended after `limit` seconds are stopped, and a single line says so as pytest would.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shutil.copytree(ROOT / "benchmarks", Path(folder, "benchmarks"))
        for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
            shutil.copy(path, folder)
        Path(folder, file).write_text(content, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", "test_rar.py"]
        environment = os.environ | {"COLUMNS": "400", "PYTHONUTF8": "1"}  # so that pytest does not cut its lines
        result = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": limit}
        try:
            return subprocess.run([*command, *options], cwd=folder, env=environment, **result).stdout
        except subprocess.TimeoutExpired:
            return f"FAILED test_rar.py::time_limit - no end after {limit} s: does a loop never stop?"


def find_exercise(source: str, function: str) -> tuple[list[ast.stmt], int, int, bool]:
    """The statements of an exercise, from which line to which (from 0, without the last), and if MARKS are around it.

    Methods are given as Class.name. Raises ValueError if there is no such exercise, and SyntaxError.
    """
    node = ast.parse(source)
    for name in function.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == name]
        if not found:
            raise ValueError(f"there is no {function}")
        node = found[-1]
    lines = source.split("\n")
    marks = [i for i in range(node.lineno, node.end_lineno) if lines[i].strip().startswith(MARKS)]
    if not marks:
        body = node.body[ast.get_docstring(node) is not None :]
        return body, body[0].lineno - 1 if body else 0, node.end_lineno, False
    if len(marks) != 2:
        raise ValueError(f"{function} must have the comment lines `{MARKS[0]}` and `{MARKS[1]}` once each")
    for loop in ast.walk(node):  # from the outside in
        body = [child for child in getattr(loop, "body", []) if marks[0] < child.lineno - 1 < marks[1]]
        if body:
            return body, marks[0] + 1, marks[1], True
    return [], marks[0] + 1, marks[1], True


def replace_exercise(source: str, function: str, code: str) -> str:
    """The source with other code in the place of an exercise."""
    body, start, stop, _ = find_exercise(source, function)
    lines = source.split("\n")
    lines[start:stop] = [indent(code or "pass", " " * body[0].col_offset)]
    return "\n".join(lines)


def read_program(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def read_table() -> dict[str, dict]:
    """Function -> its file, what selects its tests, three cells of its row, minutes and points: the README's table."""
    table = {}
    section = read_program("README.md").partition("## For courses")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| `.*$", section, re.MULTILINE):
        function, tests = re.match(r'\| `([\w.]+)`.*`-k ([^`"]+|"[^`"]+")`', row).groups()
        cells, minutes, points = row.strip("| ").rsplit(" | ", 2)
        name = re.escape(function.split(".")[0])
        file = next(file for file in PROGRAM if re.search(rf"^(def|class) {name}\b", read_program(file), re.MULTILINE))
        table[function] = {"file": file, "tests": tests, "cells": cells, "minutes": minutes, "points": int(points)}
    return table


def make_handout(folder: Path, table: dict[str, dict]):
    """A copy without the exercises of the table, without their solutions, and with EXERCISES.md, which is printed."""
    if folder.exists():
        sys.exit(f"{folder} exists: name a new folder")
    hidden = shutil.ignore_patterns("__pycache__", "exercises.py", "handout.md", "mutants.py", "speed.py")
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=hidden)
    shutil.copytree(ROOT / "assets", folder / "assets")
    for file in (*PROGRAM, "test_rar.py", "pyproject.toml", "requirements.txt", "LICENSE"):
        content = read_program(file)
        for function in [name for name in table if table[name]["file"] == file]:
            content = replace_exercise(content, function, f'raise NotImplementedError("{function}")')
        (folder / file).write_text(content, encoding="utf-8")
    readme = re.sub(r"## For courses\n.*?(?=\n## |\Z)", "", read_program("README.md"), flags=re.DOTALL)
    if "train_rar" in table:
        readme = re.sub(r"```python\n.*?```\n", "(left out: an exercise)\n", readme, flags=re.DOTALL)
    (folder / "README.md").write_text("**A handout: begin with EXERCISES.md.**\n\n" + readme, encoding="utf-8")
    rows = ["| exercise | tests | paper | file | minutes | points |\n|---|---|---|---|---|---|"]
    for row in table.values():
        rows.append(f"| {row['cells']} | {row['file']} | {row['minutes']} | {row['points']:g} |")
    files = " ".join(sorted({row["file"] for row in table.values()}))
    text = read_program("benchmarks/handout.md")
    text = text.format(table="\n".join(rows), tests=next(iter(table.values()))["tests"], files=files)
    (folder / "EXERCISES.md").write_text(text, encoding="utf-8")
    print(text)


def find_mistake(folder: Path, function: str, file: str, tests: str) -> str:
    """The first message about a student's solution of an exercise; empty if all of its tests pass."""
    program = read_program(file)
    try:
        statements, _, _, marked = find_exercise((folder / file).read_text(encoding="utf-8-sig"), function)
        code = "\n".join(map(ast.unparse, statements))
        changed = replace_exercise(program, function, code)
        compile(changed, file, "exec")
    except Exception as error:  # whatever is wrong with a student's file
        return f"{file}: {type(error).__name__}: {error}"
    if marked != find_exercise(program, function)[3]:
        return f"the comment lines `{MARKS[0]}` and `{MARKS[1]}` must be as in the handout"
    if code.startswith("raise NotImplementedError"):
        return "not done"
    output = run_tests(file, changed, "-x", "-k", tests.strip('"'), limit=LIMIT)
    failed = re.search(r"^(?:FAILED|ERROR) (?:\S*::)?(\S+)(?: - (.*))?", output, re.MULTILINE)
    if failed:
        return f"{failed[1]}: {(failed[2] or '').removeprefix('AssertionError: ')}"
    return "" if re.search("^PASSED ", output, re.MULTILINE) else "Python ended in the middle of the tests"


def grade(folder: Path, table: dict[str, dict]) -> list[dict]:
    """Prints and returns what each exercise of a submission gets, and the total; all points together are 100."""
    print(folder)
    results = []
    for function, row in table.items():
        mistake = find_mistake(folder, function, row["file"], row["tests"])
        score = 0 if mistake else row["points"]
        results.append({"name": function, "score": score, "max_score": row["points"], "output": mistake or "right"})
        print(f"  {function:<30} {score:>5g} of {row['points']:<5g} {mistake}", flush=True)
    print(f"total: {round(sum(result['score'] for result in results))} of 100")
    return results


def write_results(args, folder, results):
    """Add a line to --csv, and write --json as Gradescope reads it."""
    total = round(sum(result["score"] for result in results))
    if args.csv:
        is_new = not args.csv.exists()
        with args.csv.open("a", newline="", encoding="utf-8") as file:
            if is_new:
                csv.writer(file).writerow(["submission", *[result["name"] for result in results], "total"])
            csv.writer(file).writerow([folder, *[result["score"] for result in results], total])
    if args.json:
        args.json.write_text(json.dumps({"score": total, "tests": results}, indent=1), encoding="utf-8")


def check(table: dict[str, dict]) -> bool:
    """Prints how many of its own tests fail while an exercise is blank. True if each has one that does."""
    print("| blanked | its tests | fail |\n|---|---|---|")
    failures = []
    for function, row in table.items():
        blanked = replace_exercise(read_program(row["file"]), function, "raise NotImplementedError")
        output = run_tests(row["file"], blanked, "-k", row["tests"].strip('"'))
        outcomes = re.findall(r"^(PASSED|FAILED|ERROR) \S+::", output, re.MULTILINE)
        failures.append(len(outcomes) - outcomes.count("PASSED"))
        print(f"| `{function}` | `-k {row['tests']}` | {failures[-1]} of {len(outcomes)} |", flush=True)
    return all(failures)


def main():
    parser = argparse.ArgumentParser(description="Without --handout and --grade: check the tests of all exercises.")
    parser.add_argument("--handout", nargs="+", metavar=("DIR", "FUNCTION"), help="make a copy for students")
    parser.add_argument("--grade", nargs="+", type=Path, metavar="DIR", help="grade the submissions in these folders")
    parser.add_argument("--functions", nargs="+", metavar="FUNCTION", help="what to grade or check (default: all)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="add a line with the points of each submission")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results.json for Gradescope")
    args = parser.parse_args()
    table = read_table()
    names = (args.handout[1:] if args.handout else args.functions) or list(table)
    unknown = set(names) - set(table)
    if unknown or not table:
        parser.error(f"no exercise {', '.join(sorted(unknown))}: choose from {', '.join(table)}")
    if args.json and len(args.grade or []) != 1:
        parser.error("--json is for a single submission")
    if args.handout and args.handout[0] in table:
        parser.error(f"name a new folder in front of {args.handout[0]}")
    for folder in args.grade or []:
        if not folder.is_dir():
            parser.error(f"there is no folder {folder}")
    table = {function: row for function, row in table.items() if function in names}
    whole = sum(row["points"] for row in table.values())
    for row in table.values():
        row["points"] = round(100 * row["points"] / whole, 2)
    if args.handout:
        make_handout(Path(args.handout[0]), table)
    elif args.grade:
        for folder in args.grade:
            write_results(args, folder, grade(folder, table))
    elif not check(table):
        sys.exit("an exercise can be left blank and no test sees it")


if __name__ == "__main__":
    main()
