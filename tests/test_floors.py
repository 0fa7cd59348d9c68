"""A file may import from its own floor and from floors below; the imports form no circle."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_rigl"
FLOORS = {
    **dict.fromkeys(
        (
            "kernels",
            "topology",
            "methods",
            "flops/costs",
            "flops/formulas",
            "flops/closed_forms",
            "flops/runs",
        ),
        0,
    ),
    **dict.fromkeys(("flops", "model", "export", "compute"), 1),
}
ALLOWED_THIRD_PARTY = {
    0: {
        "__future__",
        "math",
        "torch",
        "abc",
        "collections",
        "dataclasses",
        "typing",
        "difflib",
        "inspect",
        "re",
        "numbers",
        "fractions",
        "rich",
    },
    1: {"lightning", "lightning_fabric", "pytorch_lightning"},  # refused here, anything else is allowed
}


def module_name(path: Path) -> str:
    return str(path.relative_to(PACKAGE).with_suffix(""))


def floor_of(name: str) -> int:
    return next((floor for room, floor in FLOORS.items() if name == room or name.startswith(room + "/")), 2)


def imports_of(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return plain | {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}


MODULES = {module_name(p): imports_of(p) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"}


def own(imports: set[str]) -> set[str]:
    inside = {
        i.removeprefix("lightning_rigl.").replace(".", "/")
        for i in imports
        if i.startswith("lightning_rigl.")
    }
    return inside & MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    floor, imports = floor_of(name), MODULES[name]
    assert not {i for i in own(imports) if floor_of(i) > floor}, "an arrow points up"
    outside = {i.split(".")[0] for i in imports} - {"lightning_rigl"}
    if name.startswith("kernels/"):
        assert outside <= sys.stdlib_module_names | {"torch"}
        assert not [other for other in own(imports) if not other.startswith("kernels/")]
    elif floor == 0:
        assert outside <= ALLOWED_THIRD_PARTY[0], "floor 0 imports math and torch only"
    if floor <= 1:
        assert not outside & ALLOWED_THIRD_PARTY[1], "only the callbacks import lightning"


EXTENDED = {"methods/cigl": {"methods/rigl"}}  # methods that are another one and something more


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("methods/") and n != "methods/base"])
def test_a_method_imports_its_base_and_topology_only(name):
    other = {module for module in own(MODULES[name]) if not module.startswith("topology/")}
    assert "methods/base" in other
    assert other <= {"methods/base", *EXTENDED.get(name, ())}


def test_the_imports_form_no_circle():
    left = {name: own(imports) for name, imports in MODULES.items()}
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"
