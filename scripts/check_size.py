"""The package stays compact, and nothing in it unpickles: counts tokens, looks for calls that run foreign code."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "minidisagg"
MAX_LINES = 450  # of one file: it reads from top to bottom
# Tokens of code: a limit on all lines would reward packing them.
LIMITS = {
    ("core", "runtime", "transfer", "store"): 84_000,
    ("server", "measure", "monitor"): 62_000,
    (): 248_000,  # the package
}
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


def code_tokens(text: str) -> int:
    """Python's tokens without comments, docstrings and layout: those are free, or people would write fewer of them."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.end_lineno:
                docstrings.update(range(first.lineno, first.end_lineno + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type not in layout and token.start[0] not in docstrings for token in tokens)


def main() -> int:
    """Print the counts and what is wrong; returns the exit status."""
    sizes, problems = {}, []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        sizes[path.relative_to(PACKAGE)] = code_tokens(text)
        if (lines := text.count("\n")) > MAX_LINES:
            problems.append(f"{path} has {lines} lines, more than {MAX_LINES}")
        problems += [f"{path}:{line}: {what} is not allowed" for line, what in unsafe(ast.parse(text))]
    for parts, limit in LIMITS.items():
        tokens = sum(size for name, size in sizes.items() if not parts or name.parts[0] in parts)
        sys.stdout.write(f"{'+'.join(parts) or 'package'}: {tokens} of {limit} tokens of code\n")
        if tokens > limit:
            problems.append(f"too much code in {'+'.join(parts) or 'the package'}")
    sys.stdout.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
