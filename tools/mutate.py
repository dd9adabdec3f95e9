"""Changes one thing at a time in the operator's code, and sees whether the tests notice.

``make mutate`` tries mutants for MINUTES, chosen by SEED, in a copy of the tree; it prints those that survive and their
share. Of the unit tests those that call the changed function come first, and then all. What does IO is shown by tests
on a real API server: ``--also tests/controlplane/lifecycle`` runs these for what survives the unit tests.
A mutant that changes nothing which anybody could see counts as survived, too: have a look at it, and leave it.
"""

import argparse
import ast
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["pythonpath"]
SOURCES = ROOT / "operator" / "lora_operator"
TESTS = "tests/unit/operator"
LONGEST = 2
"""Tests that take so many times what they take on the tree as it is hang, and have noticed."""

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], str] = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*"}


@dataclass(frozen=True)
class Mutant:
    """``before`` at ``start`` (an offset in the text of ``path``) becomes ``after``."""

    path: Path
    start: int
    before: str
    after: str
    line: int
    function: int
    """The line on which the function around it begins, decorators included; 0 outside of all."""

    def apply(self, text: str) -> str:
        """``text`` with the change."""
        return text[: self.start] + self.after + text[self.start + len(self.before) :]

    def describe(self) -> str:
        """For people, in one line."""
        before, after = (" ".join(part.split())[:60] for part in (self.before, self.after))
        return f"{self.path.relative_to(SOURCES.parent)}:{self.line}: {before} -> {after}"


def find_mutants(path: Path, text: str) -> list[Mutant]:
    """Every change that is known how to make in ``text``."""
    lines = [0]
    for line in text.splitlines(keepends=True):
        lines.append(lines[-1] + len(line.encode()))
    data = text.encode()

    def offset(line: int, column: int) -> int:
        return len(data[: lines[line - 1] + column].decode())

    def mutant(node: ast.expr, after: str) -> Mutant:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start, end = offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)
        around = [begin for begin, last in functions if begin <= node.lineno <= last]
        return Mutant(path, start, text[start:end], after, node.lineno, max(around, default=0))

    tree = ast.parse(text)
    functions = [
        (min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]), node.end_lineno or 0)
        for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]  # fmt: skip
    return [
        mutant(node, after) for top in tree.body
        if isinstance(top, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node, after in _changes(top)
    ]  # fmt: skip


def _changes(top: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """Expressions below ``top``, and what to put in their place. Nobody sees that a class is frozen."""
    for node in _walk(top):
        source = ast.unparse
        match node:
            case ast.Compare(ops=[operator], left=left, comparators=[right]):
                yield node, f"({source(left)} {COMPARISONS[type(operator)]} {source(right)})"
            case ast.BoolOp(values=values):
                word = " or " if isinstance(node.op, ast.And) else " and "
                yield node, "(" + word.join(f"({source(value)})" for value in values) + ")"
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield node, f"({source(operand)})"
            case ast.BinOp(op=operator, left=left, right=right) if type(operator) in ARITHMETIC and not _is_text(node):
                yield node, f"({source(left)} {ARITHMETIC[type(operator)]} {source(right)})"
            case ast.Constant(value=bool(value)):
                yield node, str(not value)
            case ast.Constant(value=int() | float() as value):
                yield node, repr(value + 1)
            case ast.IfExp(test=test, body=body, orelse=other):
                yield node, f"({source(other)} if {source(test)} else {source(body)})"
            case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
                yield value, "None"


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """``node`` and all below it but decorators."""
    yield node
    decorators = getattr(node, "decorator_list", [])
    for child in ast.iter_child_nodes(node):
        if child not in decorators:
            yield from _walk(child)


def _is_text(node: ast.BinOp) -> bool:
    """Whether strings are joined: there is no opposite of that."""
    return any(isinstance(part, ast.JoinedStr) or isinstance(getattr(part, "value", None), str)
               for part in (node.left, node.right))  # fmt: skip


class Tests:
    """The tests in ``copy``: first those that call a function, then the unit tests as a whole, then ``also``."""

    def __init__(self, copy: Path, also: list[str]) -> None:
        self._copy = copy
        self._also = also
        self._callers: dict[str, list[str]] = {}
        self._stages: list[tuple[list[str], float]] = []
        """What all mutants face, with the seconds after which it hangs, and so has noticed."""

    def prepare(self) -> None:
        """Runs all on the tree as it is, and sees which unit tests call what."""
        file = self._copy / "called.json"
        os.environ["CALLED_FILE"] = str(file)
        for tests, plugin in ([TESTS], "tools.called"), (self._also, "no:cacheprovider"):
            began = time.monotonic()
            if tests and not self._pass(tests, math.inf, plugin):
                sys.exit(f"{' '.join(tests)}: tests fail on the tree as it is: mend that first")
            self._stages.append((tests, LONGEST * (time.monotonic() - began)))
        for test, functions in json.loads(file.read_text()).items():
            for function in functions:
                self._callers.setdefault(function, []).append(test)

    def notice(self, mutant: Mutant) -> bool:
        """Whether any test fails with ``mutant``."""
        target = self._copy / mutant.path.relative_to(ROOT)
        original = target.read_text()
        target.write_text(mutant.apply(original))
        try:
            stages = [(self._near(target, mutant), self._stages[0][1]), *self._stages]
            return not all(self._pass(tests, limit) for tests, limit in stages if tests)
        finally:
            target.write_text(original)

    def _near(self, target: Path, mutant: Mutant) -> list[str]:
        """The tests that call the changed function, and those that name its module."""
        module = ".".join(mutant.path.relative_to(SOURCES.parent).with_suffix("").parts)
        files = sorted(path for path in (self._copy / TESTS).rglob("test_*.py") if module in path.read_text())
        named = {str(path.relative_to(self._copy)) for path in files}
        callers = self._callers.get(f"{target}:{mutant.function}", [])
        return [*named, *(test for test in callers if test.partition("::")[0] not in named)]

    def _pass(self, tests: list[str], limit: float, plugin: str = "no:cacheprovider") -> bool:
        """Whether ``tests`` pass within ``limit`` seconds."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", plugin]
        path = os.pathsep.join(str(self._copy / name) for name in PATHS)
        arguments = self._copy / "arguments"  # there may be more than a command line holds
        arguments.write_text("\n".join(tests))
        try:
            found = subprocess.run(
                [*command, f"@{arguments}"],
                cwd=self._copy,
                env={**os.environ, "PYTHONPATH": path},
                timeout=None if limit == math.inf else limit,
                capture_output=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return found.returncode == 0


def main() -> None:
    """Tries mutants until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="which mutants, and in which order (default: 1)")
    parser.add_argument("--minutes", type=float, default=30.0, help="for how long (default: 30)")
    parser.add_argument("--only", default="", help="part of the path of the modules to look at; default: all")
    parser.add_argument("--also", nargs="*", default=[], help="tests for what survives the unit tests; default: none")
    options = parser.parse_args()
    paths = [path for path in sorted(SOURCES.rglob("*.py")) if options.only in str(path)]
    mutants = [mutant for path in paths for mutant in find_mutants(path, path.read_text())]
    random.Random(options.seed).shuffle(mutants)
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
        tests = Tests(copy, options.also)
        tests.prepare()
        tried, alive, until = 0, list[Mutant](), time.monotonic() + 60 * options.minutes
        for mutant in mutants:
            if time.monotonic() > until:
                break
            tried += 1
            if not tests.notice(mutant):
                alive.append(mutant)
                print(f"survived: {mutant.describe()}", flush=True)
            if tried % 20 == 0:
                print(f"{tried} tried, {len(alive)} survived", flush=True)
    share = len(alive) / max(tried, 1)
    print(
        f"{len(alive)} of {tried} mutants survived ({share:.1%}), of {len(mutants)} that there are; seed {options.seed}"
    )


if __name__ == "__main__":
    main()
