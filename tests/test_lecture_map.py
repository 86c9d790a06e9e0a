"""docs/lecture.md leads from each part of the lecture to its code, its proof and its picture: everything it names exists."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MAP = REPOSITORY / "docs" / "lecture.md"
TEXT = MAP.read_text(encoding="utf-8")
# [`QNetwork.forward`](../sb3_lecture_dqn/policies.py), or a file: [`test_loss.py`](../tests/test_loss.py)
NAMES_AND_FILES = sorted(set(re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", TEXT)))
LINKS = sorted(set(re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", TEXT)))


def names_defined_in(path: Path) -> set[str]:
    """Functions and classes of a module, and the methods of its classes as ``Class.method``."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{member.name}" for member in node.body if isinstance(member, ast.FunctionDef)}
    return names


def test_the_map_has_every_part_of_the_lecture() -> None:
    assert re.findall(r"^### (L\d+)\b", TEXT, flags=re.MULTILINE) == [f"L{number}" for number in range(1, 16)]


@pytest.mark.parametrize("part", range(1, 16))
def test_every_part_names_its_code_and_its_test(part: int) -> None:
    section = re.split(rf"^### L{part}\b.*$", TEXT, flags=re.MULTILINE)[1].split("\n### ")[0]
    paragraphs = section.split("\n\n")
    assert any(paragraph.startswith("**Code:**") for paragraph in paragraphs)
    assert any(paragraph.startswith("**Test:**") and "](../tests/test_" in paragraph for paragraph in paragraphs)


@pytest.mark.parametrize(("name", "file"), NAMES_AND_FILES)
def test_what_the_map_names_is_in_the_file_that_it_links(name: str, file: str) -> None:
    if name.endswith(".py"):
        assert Path(file).name == name
    else:
        assert name in names_defined_in(REPOSITORY / file)


@pytest.mark.parametrize("link", LINKS)
def test_a_link_of_the_map_leads_somewhere(link: str) -> None:
    assert (MAP.parent / link).exists()


def test_the_names_in_the_map_are_found_at_all() -> None:
    # The patterns above would pass on nothing if the map's notation changed.
    assert len(NAMES_AND_FILES) > 40
    assert len([link for link in LINKS if link.endswith(".png")]) >= 9
