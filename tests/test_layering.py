"""The reading order is the import order: a file imports only what stands above it in the guide.

The guide is the docstring of dae/__init__.py.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "dae").rglob("__init__.py")
EMPTY = [p for p in PACKAGES if len(ast.parse(p.read_text()).body) == 1]  # nothing but a docstring
FILES = sorted(set((ROOT / "dae").rglob("*.py")) - set(EMPTY))
GUIDE = ast.get_docstring(ast.parse((ROOT / "dae" / "__init__.py").read_text())) or ""
ORDER = re.findall(r"^    +(\S+\.py) ", GUIDE, flags=re.M)


def module(path: Path) -> str:
    return str(path.relative_to(ROOT / "dae"))


def imports(path: Path) -> set[str]:
    """Modules of the project that a file imports, as paths below dae/."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    found = set()
    for name in names:
        base = ROOT.joinpath(*name.split("."))
        candidates = (base.with_suffix(".py"), base / "__init__.py")
        found |= {module(p) for p in candidates if p.is_file() and p.is_relative_to(ROOT / "dae")}
    return found


def test_the_guide_names_every_file_once() -> None:
    assert sorted(ORDER) == [module(p) for p in FILES]


@pytest.mark.parametrize("path", FILES, ids=module)
def test_a_file_imports_only_what_stands_above_it(path: Path) -> None:
    above = ORDER[: ORDER.index(module(path))]
    assert imports(path) - {module(p) for p in EMPTY} <= set(above)


@pytest.mark.parametrize(
    "folder, allowed",
    [
        ("model", {"torch", "einops", "timm"}),
        ("pretext", {"torch", "einops", "timm"}),
        ("data", {"numpy", "scipy", "nibabel", "torch", "einops", "tqdm"}),
    ],
)
def test_the_method_needs_no_more_than_torch_einops_and_timm(
    folder: str, allowed: set[str]
) -> None:
    for path in (ROOT / "dae" / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            tops = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            tops += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in tops:
                assert top.split(".")[0] in allowed | sys.stdlib_module_names | {"dae"}, (
                    f"{path.name} imports {top}"
                )


def test_nothing_imports_the_scripts() -> None:
    scripts = {"train_pretrain", "train_seg", "eval"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            assert not scripts & set(names) and "." not in names, path.name


@pytest.mark.parametrize("folder", ["model", "pretext"])
def test_shapes_change_by_einops_alone(folder: str) -> None:
    """`view` and `permute` hide what a pattern shows; a `view` scrambled the authors' axes."""
    for path in (ROOT / "dae" / folder).glob("*.py"):
        used = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
        }
        assert not used & {"view", "permute", "transpose", "flatten", "reshape", "T", "mT"}, (
            path.name
        )
