"""The rooms of the package, each of which imports only from those above it, and the public names.

Imports inside functions count as well: put off until the call, they still run the same way. Only what stands under
`if TYPE_CHECKING:` is let through, since it never runs.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qnb

PACKAGE = Path(qnb.__file__).parent
# Top to bottom.
ROOMS = "errors results env progress ops schemes rounding model measure tune notebook demo __init__".split()
# Folders of files that belong to a room of another name.
PART_OF = {"_demo": "demo"}
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "_lib" not in p.parts)


def room(module: list[str]) -> str:
    """The room of a module, whose path inside the package is given; the package itself is the last room."""
    first = module[0] if module else "__init__"
    return PART_OF.get(first, first)


def imported(tree: ast.AST) -> list[tuple[int, list[str]]]:
    """Line and path inside the package of every import of qnb that can run."""
    found: list[tuple[int, list[str]]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            found += [item for branch in node.orelse for item in imported(ast.Module([branch], []))]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "qnb"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides the room that it enters"
            path = (node.module or "").split(".")
            if path == ["qnb"]:
                # `from qnb import schemes` enters that room; `from qnb import quantize` the package's own namespace.
                found += [(node.lineno, [a.name] if room([a.name]) in ROOMS else []) for a in node.names]
            elif path[0] == "qnb":
                found.append((node.lineno, path[1:]))
        else:
            found += imported(node)
    return found


def upward(source: str, own: str) -> list[tuple[int, str]]:
    """Line and target of every import in `source`, a file of room `own`, that enters a room below it."""
    targets = [(line, room(path)) for line, path in imported(ast.parse(source))]
    return [(line, target) for line, target in targets if ROOMS.index(target) > ROOMS.index(own)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_from_rooms_above_it(path: Path):
    own = room([path.relative_to(PACKAGE).with_suffix("").parts[0]])
    assert own in ROOMS, f"{own} is no room: the rooms are {', '.join(ROOMS)}"
    assert upward(path.read_text(encoding="utf-8"), own) == []


@pytest.mark.parametrize(
    "source, entered",
    [
        ("from qnb.measure.profile import profile", "measure"),
        ("import qnb.notebook.magics", "notebook"),
        ("import qnb", "__init__"),
        ("from qnb import quantize", "__init__"),
        ("from qnb import demo", "demo"),
        ("def f():\n    from qnb.demo import demo_lm", "demo"),
        ("if True:\n    try:\n        import qnb.tune\n    except ImportError:\n        pass", "tune"),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import qnb.tune", "tune"),
    ],
)
def test_an_import_the_wrong_way_is_seen(source: str, entered: str):
    assert [target for _, target in upward(source, "model")] == [entered]


def test_imports_that_are_allowed_are_let_through():
    source = (
        "import torch\nfrom qnb import ops\nfrom qnb.errors import QnbError\nif TYPE_CHECKING:\n    import qnb.tune\n"
    )
    assert upward(source, "model") == []


def test_no_public_name_is_that_of_a_module_beside_it():
    """Importing qnb.x would put the module in the place of the function qnb.x."""
    beside = {p.stem if p.suffix == ".py" else p.name for p in PACKAGE.iterdir()}
    assert beside.isdisjoint(name for name in qnb.__all__ if name != "__version__")


def test_every_public_name_is_there():
    assert set(qnb.__all__) <= set(dir(qnb))
    for name in qnb.__all__:
        assert getattr(qnb, name) is not None
    with pytest.raises(AttributeError, match="its names are"):
        _ = qnb.quantise


def test_version_is_that_of_the_project():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{qnb.__version__}"\n' in project
