"""Measures the structure of a source tree: files, functions, imports between modules, words of the pages; prints JSON.

    python scripts/ci/measure_house.py [ROOT]

Run it on two checkouts to compare them. An import counts once for each pair of modules, wherever in the file it
stands, but for those under TYPE_CHECKING. The longest chain is a path of imports, a module a stop. A floor of a package
is one above the highest package that it imports.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Container
from functools import cache
from pathlib import Path
from statistics import mean, median

PACKAGE = "requant"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def percentile(values: list[int], share: float) -> int:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def name_of(path: Path, root: Path) -> str:
    """The dotted name of the module at `path`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.Module, known: Container[str]) -> set[str]:
    """The `known` modules that a module may import at run time; `from a import b` imports a.b where that is one."""
    skipped = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for part in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else node.module for name in full}
    return {name for name in names if name in known}


def read_imports(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> the other modules of the package that it imports."""
    return {module: imported_modules(tree, trees) - {module} for module, tree in trees.items()}


def largest_circle(imports: dict[str, set[str]]) -> int:
    """How many modules import each other in the largest circle; 1 where there is none."""

    @cache
    def reached(module: str) -> frozenset[str]:
        found, waiting = set[str](), [module]
        while waiting:
            for other in imports[waiting.pop()] - found:
                found.add(other)
                waiting.append(other)
        return frozenset(found)

    return max(1, *(sum(module in reached(other) for other in reached(module)) for module in imports))


def longest_chain(imports: dict[str, set[str]]) -> list[str]:
    """The longest path of imports; a module that imports itself through others is passed once."""
    under_way: set[str] = set()

    @cache
    def chain(module: str) -> tuple[str, ...]:
        under_way.add(module)
        below = [chain(other) for other in sorted(imports[module]) if other not in under_way]
        under_way.discard(module)
        return (module, *max(below, key=len, default=()))

    return list(max((chain(module) for module in imports), key=len))


def floors(imports: dict[str, set[str]]) -> dict[str, int]:
    """Top-level package or module -> its floor, 1 for those that import no other."""
    part = {m: m.split(".")[1] for m in imports if m.count(".") and not m.split(".")[1].startswith("_")}
    below: dict[str, set[str]] = {top: set() for top in part.values()}
    for module, others in imports.items():
        if module in part:
            below[part[module]] |= {part[o] for o in others if o in part} - {part[module]}
    found = dict.fromkeys(below, 1)
    for _ in found:  # as often as there are packages, which settles it unless they import each other in a circle
        for top, others in below.items():
            found[top] = 1 + max((found[o] for o in others), default=0)
    return found


def n_parameters(function: Function) -> int:
    """Parameters of a function, `self` and `cls` not counted."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def count_words(paths: list[Path]) -> int:
    """Words as `wc -w` counts them."""
    return sum(len(path.read_text(encoding="utf-8").split()) for path in paths)


def measure(root: Path) -> dict[str, object]:
    """All figures of the checkout at `root`."""
    paths = sorted((root / PACKAGE).rglob("*.py"))
    texts = {name_of(path, root): path.read_text(encoding="utf-8") for path in paths}
    trees = {module: ast.parse(text) for module, text in texts.items()}
    functions = [
        (module, node) for module, tree in trees.items() for node in ast.walk(tree) if isinstance(node, Function)
    ]
    lines = [len(text.splitlines()) for text in texts.values()]
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for _, node in functions]
    parameters = [n_parameters(node) for _, node in functions]
    imports = read_imports(trees)
    chain = longest_chain(imports)
    top = [p for p in (root / PACKAGE).iterdir() if not p.name.startswith("_") and (p.suffix == ".py" or p.is_dir())]
    classes = [n.name for tree in trees.values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    crowded = [(n_parameters(node), f"{module}.{node.name}") for module, node in functions if n_parameters(node) > 8]
    docs = sorted((root / "docs").rglob("*.md"))
    return {
        "files": len(paths),
        "lines": sum(lines),
        "file_median": median(lines),
        "file_max": max(lines),
        "functions": len(functions),
        "function_median": median(lengths),
        "function_p90": percentile(lengths, 0.9),
        "function_max": max(lengths),
        "parameters_p99": percentile(parameters, 0.99),
        "parameters_max": max(parameters),
        "more_than_8_parameters": [name for _, name in sorted(crowded, reverse=True)],
        "top_modules": sum(p.suffix == ".py" for p in top),
        "top_packages": sum((p / "__init__.py").exists() for p in top),
        "imports_a_module": round(mean(map(len, imports.values())), 2),
        "longest_chain": len(chain),
        "chain": chain,
        "largest_circle": largest_circle(imports),
        "floors": max(floors(imports).values()),
        "floor_of": dict(sorted(floors(imports).items(), key=lambda item: (item[1], item[0]))),
        "classes_named_twice": sorted({name for name in classes if classes.count(name) > 1}),
        "words_readme": count_words([root / "README.md"]),
        "words_changelog": count_words([root / "CHANGELOG.md"]),
        "words_docs": count_words(docs),
        "words_docs_written": count_words([p for p in docs if p.parent.name != "reference"]),
        "pages_written": sum(p.parent.name != "reference" for p in docs),
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()), indent=2))
