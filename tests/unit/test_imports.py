"""Imports go one way: every package imports only from those before it in ORDER."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import twa_scale

PACKAGE = Path(__file__).resolve().parents[2] / "twa_scale"
ORDER = [
    "version",
    "errors",
    "base",
    "config",
    "ranks",
    "kernels",
    "store",
    "candidates",
    "engines",
    "output",
    "average",
    "merge",
    "running",
    "integrations",
    "run",
    "tools",
    "cli",
    "__main__",
]


def modules(package: Path) -> dict[str, Path]:
    """Return file by dotted module name; `candidates/__init__.py` is `twa_scale.candidates`."""
    return {
        ".".join((package.name, *file.relative_to(package).with_suffix("").parts)).removesuffix(".__init__"): file
        for file in sorted(package.rglob("*.py"))
    }


def imports(module: str, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Yield (line, module of the package) of every import of a file, also inside functions and branches."""
    root = module.split(".")[0]
    home = module if known[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(known[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = home.split(".")[: len(home.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            # `from package import name`: a module of that name, or a name in the package
            names = [name if name in known else base for name in names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == root)


def package_of(module: str) -> str:
    """Return the top-level module or package of a module, or an empty text for the package itself."""
    return (*module.split(".")[1:], "")[0]


def violations(module: str, known: dict[str, Path], order: list[str]) -> list[str]:
    """Return one message for each import from a package that is neither earlier nor the module's own."""
    own = package_of(module)
    if not own:  # the package itself comes last
        return []
    if own not in order:
        return [f"{module}: `{own}` has no place in the import order; give it one in {Path(__file__).name}"]
    allowed = order[: order.index(own) + 1]
    return [
        f"{known[module].name}:{line}: {module} imports {target}, which does not come before `{own}`"
        for line, target in imports(module, known)
        if package_of(target) not in allowed
    ]


def circle(known: dict[str, Path]) -> list[str]:
    """Return the modules of an import cycle, or an empty list."""
    graph = {module: {target for _, target in imports(module, known)} for module in known}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


MODULES = modules(PACKAGE)


def test_imports_run_one_way() -> None:
    """One test checks all modules. The message of each violation names its module."""
    assert [message for module in MODULES for message in violations(module, MODULES, ORDER)] == []


def test_packages_have_no_import_cycles() -> None:
    assert not circle(MODULES)


def test_packages_only_re_export() -> None:
    """All packages but the top-level one, which imports its public names on first use."""
    packages = {name: file for name, file in MODULES.items() if file.name == "__init__.py" and name != PACKAGE.name}
    assert [f"{name}:{line} is logic" for name, file in packages.items() for line in logic(file)] == []


def logic(file: Path) -> list[int]:
    """Return the lines of statements other than docstrings, imports and `__all__`."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]  # the docstring
    return [node.lineno for node in body if not isinstance(node, ast.Import | ast.ImportFrom) and not names_only(node)]


def names_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]


def test_imports_no_torch() -> None:
    """The module is loaded without the package's `__init__`, which re-exports names that need torch."""
    program = f"""
import importlib, sys, types
package = types.ModuleType("twa_scale")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["twa_scale"] = package
for module in ("errors", "config", "cli"):
    importlib.import_module("twa_scale." + module)
    assert "torch" not in sys.modules, module
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    ("file", "text", "actual"),
    [
        ("low.py", "import os, torch\n", []),
        ("high.py", "from demo.low import x\nfrom demo import low\n", []),
        ("low.py", "import demo.high\n", ["demo.high"]),
        ("low.py", "from demo import high\n", ["demo.high"]),
        ("low.py", "from . import high\n", ["demo.high"]),
        ("low.py", "def f():\n    from demo.wide.inner import x\n", ["demo.wide.inner"]),
        ("low.py", "from demo import attach\n", ["imports demo,"]),
        (
            "wide/inner.py",
            "from ..low import x\nfrom .other import y\nfrom ..high import z\n",
            ["demo.high"],
        ),
        ("other.py", "", ["no place in the import order"]),
    ],
)
def test_refusal_to_replace_foreign_files(tmp_path: Path, file: str, text: str, actual: list[str]) -> None:
    demo = tmp_path / "demo"
    (demo / "wide").mkdir(parents=True)
    for name in ("__init__.py", "low.py", "wide/__init__.py", "wide/inner.py", "wide/other.py", "high.py"):
        (demo / name).touch()
    (demo / file).write_text(text)
    known = modules(demo)
    module = next(name for name, path in known.items() if path == demo / file)
    messages = violations(module, known, ["low", "wide", "high"])
    assert len(messages) == len(actual)
    assert all(part in message for part, message in zip(actual, messages, strict=True))


def test_import_cycles_are_found(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "one.py").write_text("import demo.two\n")
    assert circle(modules(demo)) == []
    (demo / "two.py").write_text("def f():\n    from demo.one import x\n")
    assert set(circle(modules(demo))) == {"demo.one", "demo.two"}


def test_windows_is_refused_in_one_line() -> None:
    program = "import sys; sys.platform = 'win32'; import twa_scale"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "WSL 2" in ended.stderr.splitlines()[-1]


def test_public_names_are_imported_on_first_use() -> None:
    assert set(dir(twa_scale)) == set(twa_scale.__all__)
    assert all(getattr(twa_scale, name) is not None for name in twa_scale.__all__)
    with pytest.raises(AttributeError, match="no attribute 'attacj'"):
        _ = twa_scale.attacj
