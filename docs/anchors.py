"""
Point the links of README.md and docs/lecture.md at the line where the function, class or test that they name is defined.

::

    python docs/anchors.py

The text of a link says which one: ``[`QNetwork.forward`](../sb3_lecture_dqn/policies.py)``, or below a table, where it keeps
the rows short, ``[`QNetwork.forward`]: sb3_lecture_dqn/policies.py``. A link that names a file leads to its top.
"""

import argparse
import ast
import re
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FILES = (REPOSITORY / "README.md", REPOSITORY / "docs" / "lecture.md")
LINK = re.compile(r"(?P<start>\[`(?P<name>[\w./]+)`\](?:\(|: ))(?P<path>[\w./]+\.py)(?:#L\d+)?")


@cache
def definitions(module: Path) -> dict[str, int]:
    """
    Where the functions and classes of a module are defined.

    :param module: Its file
    :return: The line of each name, for a method of ``Class.method``
    """
    lines = {}
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            methods = (member for member in node.body if isinstance(member, ast.FunctionDef))
            lines.update({f"{node.name}.{method.name}": method.lineno for method in methods})
    return lines


def point_at_lines(text: str, folder: Path) -> str:
    """
    Give every link that names a definition the anchor of its line.

    :param text: Markdown
    :param folder: Where the paths of its links start
    :return: The text with new anchors
    :raises OSError: if a link leads to no file
    :raises LookupError: if the file does not define what the link names
    """

    def point(match: re.Match[str]) -> str:
        start, name, path = match.group("start", "name", "path")
        if name.endswith(".py"):
            return f"{start}{path}"
        lines = definitions(folder / path)
        if name not in lines:
            raise LookupError(f"{path} defines no {name}")
        return f"{start}{path}#L{lines[name]}"

    return LINK.sub(point, text)


def main() -> None:
    """Write the anchors, of both files or of none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    texts = {}
    for file in FILES:
        try:
            texts[file] = point_at_lines(file.read_text(encoding="utf-8"), file.parent)
        except (OSError, LookupError) as error:
            parser.error(f"{file.relative_to(REPOSITORY)} has a link that leads nowhere: {error}")
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
