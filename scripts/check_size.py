"""The package stays compact, and nothing in it unpickles: counts lines, looks for calls that would run foreign code."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "minidisagg"
ENGINE = ("core", "runtime", "transfer")
ENGINE_LINES, PACKAGE_LINES = 4_200, 12_400
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal"}


def unsafe(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and reason of each import of an unpickler, `torch.load`, and torch.distributed's `*_object*` calls."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names if name.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            found.append((node.lineno, str(node.module)))
        elif isinstance(node, ast.Attribute):
            if node.attr == "load" and isinstance(node.value, ast.Name) and node.value.id == "torch":
                found.append((node.lineno, "torch.load"))
            elif node.attr.endswith(("_object", "_object_list")):
                found.append((node.lineno, node.attr))
    return found


def code_lines(text: str) -> int:
    """Lines with code on them: blank lines, comments and docstrings are free, or people would write fewer of them."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.end_lineno:
                docstrings.update(range(first.lineno, first.end_lineno + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def main() -> int:
    """Print the counts and what is wrong; returns the exit status."""
    sizes, problems = {}, []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(PACKAGE)
        sizes[name] = code_lines(text)
        problems += [f"{path}:{line}: {what} is not allowed" for line, what in unsafe(ast.parse(text))]
    engine = sum(lines for name, lines in sizes.items() if name.parts[0] in ENGINE)
    package = sum(sizes.values())
    if engine >= ENGINE_LINES or package >= PACKAGE_LINES:
        problems.append("too many lines")
    sys.stdout.write(f"{'+'.join(ENGINE)}: {engine} of {ENGINE_LINES} lines of code; ")
    sys.stdout.write(f"package: {package} of {PACKAGE_LINES}\n")
    sys.stdout.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
