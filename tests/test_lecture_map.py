"""
The two maps of the lecture, README.md's and docs/lecture.md, lead from each of its parts to the line of its code, to its proof
and to its picture: everything they name exists, where they say.
"""

import re
from pathlib import Path

import anchors
import pytest

README, GALLERY = anchors.FILES
TEXT = GALLERY.read_text(encoding="utf-8")
README_MAP = README.read_text(encoding="utf-8").split("\n## From the lecture to the code\n")[1].split("\n## ")[0]
PARTS = [f"L{number}" for number in range(1, 16)]
COMMAND = "a definition has moved, or a link has no line yet: python docs/anchors.py"
# [`QNetwork.forward`](../sb3_lecture_dqn/policies.py#L1), or [`QNetwork.forward`]: sb3_lecture_dqn/policies.py#L1
LINK_TARGETS = re.compile(r"\](?:\(|: )([^)#:\s]+)(?:#[\w-]*)?")


def links_of(file: Path) -> list[str]:
    return sorted(set(LINK_TARGETS.findall(file.read_text(encoding="utf-8"))))


def stale_links(file: Path) -> list[tuple[str, str]]:
    """Links as they are, and as they should be."""
    text = file.read_text(encoding="utf-8")
    pairs = ((match[0], anchors.point_at_lines(match[0], file.parent)) for match in anchors.LINK.finditer(text))
    return [(link, corrected) for link, corrected in pairs if link != corrected]


def heading_anchors(text: str) -> set[str]:
    """What GitHub calls the headings."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run_command(folder: Path, pages: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors, "REPOSITORY", folder)
    monkeypatch.setattr(anchors, "FILES", pages)
    monkeypatch.setattr("sys.argv", ["anchors.py"])
    anchors.main()


def test_the_gallery_has_every_part_of_the_lecture() -> None:
    assert re.findall(r"^### (L\d+)\b", TEXT, flags=re.MULTILINE) == PARTS


def test_the_readmes_map_has_every_part_of_the_lecture_and_leads_to_its_part_of_the_gallery() -> None:
    assert re.findall(r"^\| \[(L\d+)\] \|", README_MAP, flags=re.MULTILINE) == PARTS
    of_each = re.findall(r"^\[(L\d+)\]: docs/lecture\.md#([\w-]+)$", README_MAP, flags=re.MULTILINE)
    assert [part for part, _ in of_each] == PARTS
    assert all(anchor.startswith(f"{part.lower()}-") and anchor in heading_anchors(TEXT) for part, anchor in of_each)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_names_its_code_and_its_test(part: str) -> None:
    section = re.split(rf"^### {part}\b.*$", TEXT, flags=re.MULTILINE)[1].split("\n### ")[0]
    paragraphs = section.split("\n\n")
    assert any(paragraph.startswith("**Code:**") and "#L" in paragraph for paragraph in paragraphs)
    assert any(paragraph.startswith("**Test:**") and "](../tests/test_" in paragraph for paragraph in paragraphs)


@pytest.mark.parametrize("file", anchors.FILES, ids=lambda file: file.name)
def test_a_link_leads_to_the_line_where_what_it_names_is_defined(file: Path) -> None:
    assert stale_links(file) == [], COMMAND


@pytest.mark.parametrize("file", anchors.FILES, ids=lambda file: file.name)
def test_a_link_to_code_names_one_definition_or_the_file(file: Path) -> None:
    matches = list(anchors.LINK.finditer(file.read_text(encoding="utf-8")))
    # the patterns would pass on nothing if the notation of the maps changed
    assert len(matches) >= 20
    assert [match["path"] for match in matches] == re.findall(r"\](?:\(|: )([^)\s]+\.py)", file.read_text(encoding="utf-8"))
    assert all(match["path"].endswith(match["name"]) for match in matches if match["name"].endswith(".py"))


def test_what_the_readmes_map_names_has_its_link_below_the_table() -> None:
    table, _, below = README_MAP.partition("\n\n[L1]: ")
    assert set(re.findall(r"\[(`[\w.]+`)\](?!\()", table)) == set(re.findall(r"^\[(`[\w.]+`)\]: ", below, flags=re.MULTILINE))


@pytest.mark.parametrize("file", anchors.FILES, ids=lambda file: file.name)
def test_a_link_of_a_map_leads_somewhere(file: Path) -> None:
    assert [link for link in links_of(file) if not link.startswith("http") and not (file.parent / link).exists()] == []


def test_the_gallery_shows_a_picture_for_each_example() -> None:
    assert len([link for link in links_of(GALLERY) if link.endswith(".png")]) >= 9


CODE = """\
import functools


def top(): ...


class Network:
    @functools.cache
    def forward(self): ...
"""


def test_the_anchor_of_a_function_of_a_class_and_of_a_method_is_its_line(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(CODE)
    before = "[`top`](code.py), [`Network`](code.py#L1) in [`code.py`](code.py)\n\n[`Network.forward`]: code.py#L999\n"
    after = "[`top`](code.py#L4), [`Network`](code.py#L7) in [`code.py`](code.py)\n\n[`Network.forward`]: code.py#L9\n"
    assert anchors.point_at_lines(before, tmp_path) == after
    assert anchors.point_at_lines(after, tmp_path) == after


def test_the_command_corrects_what_the_test_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code.py").write_text(CODE)
    page = tmp_path / "page.md"
    page.write_text("[`top`](code.py#L1)")
    assert stale_links(page) == [("[`top`](code.py#L1", "[`top`](code.py#L4")]
    run_command(tmp_path, [page], monkeypatch)
    assert stale_links(page) == []
    assert page.read_text() == "[`top`](code.py#L4)"


@pytest.mark.parametrize(
    ("link", "reason"),
    [("[`bottom`](code.py)", "code.py defines no bottom"), ("[`top`](cod.py)", "No such file or directory")],
)
def test_the_command_names_a_link_that_leads_nowhere_and_writes_nothing(
    link: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "code.py").write_text(CODE)
    pages = [tmp_path / "good.md", tmp_path / "bad.md"]
    pages[0].write_text("[`top`](code.py)")
    pages[1].write_text(link)
    with pytest.raises(SystemExit) as end:
        run_command(tmp_path, pages, monkeypatch)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "bad.md has a link that leads nowhere: " in message
    assert reason in message
    assert pages[0].read_text() == "[`top`](code.py)"
