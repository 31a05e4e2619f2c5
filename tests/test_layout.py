"""Imports go one way, so that a model, a flow or a metric can be read and used without what stands above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vit5gen"
# A module imports from its own layer or a lower one, and only within its own package on the same layer.
LAYERS = [
    {"system"},
    {"section"},
    {"config", "registry"},
    {"models", "flow", "data"},
    {"generation"},
    {"evaluation"},
    {"report"},
    {"training"},
    {"lab"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
APART = [{"models", "flow"}, {"models", "data"}, {"flow", "data"}]


def imported(file: Path) -> set[str]:
    """Return the parts of the package that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = str(node.module)
            names = [f"{module}.{alias.name}" if module == "vit5gen" else module for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("vit5gen.")}
    return found & set(RANK)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for other in imported(file) - {own}:
        assert RANK[other] <= RANK[own], f"{own} imports {other}"
        assert {own, other} not in APART, f"{own} imports {other}"


def test_importing_the_package_is_light() -> None:
    code = "import sys, vit5gen; assert not {'torch', 'diffusers', 'pydantic', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): file for name, file in modules.items()}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {one if one in modules else node.module for one in inner}
        graph[name] = (found & modules.keys()) - {name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


# A command's module has the command's name, beside the package that does it; the stubs of `python -m` have old names;
# the contract fixes the names of objectives; diffusers looks for the class of a saved pipeline in a file of this name.
TWICE = {
    "autoencoder": {"commands", "data"},
    "benchmark": {"commands", "lab"},
    "flow": {"", "flow", "training/objectives"},
    "pipeline": {"generation", "shipped/emoji-64"},
    "report": {"", "commands"},
    "study": {"", "commands", "lab"},
}


def test_a_module_name_means_one_thing() -> None:
    places: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        module = file.parent if file.stem in ("__init__", "__main__") else file
        if module != PACKAGE:
            places.setdefault(module.stem, set()).add(module.parent.relative_to(PACKAGE).as_posix().strip("."))
    assert {name: found for name, found in places.items() if len(found) > 1} == TWICE


# Facts of their own, which have name and value in common: if one changed, the other would stay.
OWN_DEFAULTS = {
    ("adm_fp16", False),  # of a public function, and of the metric that users choose by name
    ("compile", False),  # of training, where "auto" would do too; of a network that draws
    ("precision", "fp32"),  # of drawing, whose bytes are to be the same elsewhere; of an autoencoder's training
    ("pretrained", False),  # of each model that timm knows: its convention for their functions
    ("weight", 1),  # of an objective in the sum of losses; of rows in a product of features
}


def literal(value: ast.expr | None) -> object:
    """Return the value of a default that is written out; None for another one, and where it says that there is none."""
    try:
        found = None if value is None else ast.literal_eval(value)
    except ValueError:
        return None
    return None if found in (None, (), [], {}, ...) else found if isinstance(found, int | float | str) else repr(found)


def test_no_default_is_written_twice() -> None:
    owners: dict[tuple[str, object], list[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            given: list[tuple[str, ast.expr | None]] = []
            if isinstance(node, ast.FunctionDef):
                positional = node.args.posonlyargs + node.args.args
                given = [
                    (one.arg, value) for one, value in zip(positional[::-1], node.args.defaults[::-1], strict=False)
                ]
                given += [
                    (one.arg, value) for one, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                ]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                field = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") in ("Field", "argument")
                given = [(node.target.id, node.value.args[0] if field and node.value.args else node.value)]
            for name, value in given:
                if (found := literal(value)) is not None:
                    owners.setdefault((name, found), []).append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    twice = {key: places for key, places in owners.items() if len(places) > 1}
    assert twice.keys() == OWN_DEFAULTS, {key: twice[key] for key in twice.keys() - OWN_DEFAULTS}
