"""docs/security.md names every attack, and every attack that it names is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "security.md"
ATTACKS = ROOT / "tests" / "security"
CELLS = ["who", "what they can reach", "what they want", "what stops them", "the attack"]


def attacks() -> dict[str, Path]:
    """Tests whose docstring begins with ``Attack:``, by their names without ``test_``."""
    found: dict[str, Path] = {}
    for path in sorted(ATTACKS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (ast.get_docstring(node) or "").startswith("Attack: "):
                assert node.name not in found
                found[node.name.removeprefix("test_")] = path
    return found


def rows() -> list[list[str]]:
    """The cells of each threat."""
    table = PAGE.read_text().split("## Threats\n")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert cells[0] == CELLS
    return cells[2:]


def test_each_threat_has_an_attack_and_each_attack_a_threat() -> None:
    there, named = attacks(), dict[str, Path]()
    for row in rows():
        assert len(row) == len(CELLS), row
        assert all(row), row
        links = re.findall(r"\[(\w+)\]\(([^)]+)\)", row[-1])
        assert links, row
        named |= {name: (PAGE.parent / target).resolve() for name, target in links}
    assert named == there
