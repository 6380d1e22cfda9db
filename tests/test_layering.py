"""The import graph of the package, read from the source, against the layers of the design."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "qsparse_export": "qsparse_export",
    "qsparse_export.passes": "passes",
    "qsparse_export.runtimes": "runtimes",
    "qsparse_export.targets": "targets",
}
# A layer may import itself and what is listed beside it, nothing else: imports point downwards only.
BASE = {"errors", "config", "weights", "weight_formats", "versions"}
LAYERS: dict[str, set[str]] = {
    "cli": {"stages", "nn", "passes", "runtimes", "formats", "targets", "base"},
    "stages": {"nn", "passes", "runtimes", "ops", "formats", "targets", "base"},
    "nn": {"runtimes", "ops", "formats", "base"},
    "passes": {"ops", "formats", "base"},
    "runtimes": {"ops", "formats", "targets", "base"},
    "ops": {"formats", "base"},
    "targets": {"base"},
    "formats": {"base"},
    "base": set(),
}


def layer(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1:
        return "cli"  # the package itself re-exports its stages, lazily
    name = parts[1]
    if name in BASE:
        return "base"
    return name if name in LAYERS else "stages"


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in inner if part != "__init__")))
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "qsparse_export"}


def test_imports_point_downwards_only():
    known = modules()
    assert len(known) > 30
    wrong = []
    for module, path in known.items():
        here = layer(module)
        for name in imports(path):
            target = name if name in known else name.rpartition(".")[0]
            if target in ("qsparse_export", "") or target not in known:
                continue
            there = layer(target)
            if there != here and there not in LAYERS[here]:
                wrong.append(f"{module} ({here}) imports {target} ({there})")
    assert not wrong, "\n".join(wrong)


def test_passes_know_no_runtime_and_graph_construction_no_target():
    for module, path in modules().items():
        if module.startswith("qsparse_export.passes") or module == "qsparse_export.exporter":
            for name in imports(path):
                assert not name.startswith(("qsparse_export.runtimes", "qsparse_export.targets")), f"{module}: {name}"


def test_nothing_is_imported_under_the_bare_folder_names():
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in ("passes", "runtimes", "targets"), f"{module}: {node.module}"
