"""Make small changes of a source file, one at a time; each should make some test fail.

An edit replaces a piece of the text, so that a mutant differs from its original only there. Not changed: annotations, docstrings,
decorators, words for people, and arguments that only make mistakes visible (`strict` of zip, `encoding`).
"""

from __future__ import annotations

import ast
import difflib
import re
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
TWINS = {"min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "floor": "ceil"}
# f(x) → x
TRANSPARENT = {"abs", "bool", "float", "int", "reversed", "round", "set", "sorted", "str"}
# f(x, y) is f(y, x)
COMMUTATIVE = {"equal", "isclose", "max", "min", "promote_types"}
QUIET_KEYWORDS = {"description", "encoding", "help", "metavar", "prog", "strict"}
QUIET_CALLS = {"logger.debug", "logger.info", "cast", "TypeVar"}
DATA = re.compile(r"[^\s]+")


@dataclass(frozen=True)
class Mutant:
    """A file with one change. function: qualified name of the innermost function around it, "" outside of all."""

    file: str
    function: str
    line: int
    kind: str
    source: str
    diff: str

    @property
    def name(self) -> str:
        """Identifies the mutant in its file, independent of line numbers."""
        return f"{self.file}::{self.function}\n{self.diff}"


@dataclass(frozen=True)
class _Edit:
    start: int
    end: int
    text: str
    line: int
    kind: str


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Make all mutants of a file, in the order of its text. file: its name, for `Mutant.file`."""
    maker = _Maker(source)
    maker.visit(ast.parse(source))
    found: dict[str, Mutant] = {}
    original = ast.dump(ast.parse(source))
    data = source.encode()
    for function, edit in sorted(maker.edits, key=lambda pair: (pair[1].start, pair[1].end, pair[1].text)):
        changed = (data[: edit.start] + edit.text.encode() + data[edit.end :]).decode()
        try:
            if changed in found or ast.dump(ast.parse(changed)) == original:
                continue
        except SyntaxError:
            continue
        found[changed] = Mutant(file, function, edit.line, edit.kind, changed, _diff(source, changed))
    return list(found.values())


def _diff(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


class _Maker(ast.NodeVisitor):
    """Walk a file and collect its edits."""

    def __init__(self, source: str) -> None:
        self._data = source.encode()
        self._starts = [0]
        for line in source.encode().splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._scope: list[str] = []
        self._function = ""
        self._bound: set[str] = set()
        self.edits: list[tuple[str, _Edit]] = []

    def _start(self, node: ast.AST) -> int:
        return self._starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def _end(self, node: ast.AST) -> int:
        return self._starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def _text(self, node: ast.AST) -> str:
        return self._data[self._start(node) : self._end(node)].decode()

    def _edit(self, start: int, end: int, text: str, node: ast.AST, kind: str) -> None:
        self.edits.append((self._function, _Edit(start, end, text, node.lineno, kind)))  # type: ignore[attr-defined]

    def _replace(self, node: ast.AST, text: str, kind: str) -> None:
        self._edit(self._start(node), self._end(node), text, node, kind)

    def _operator(self, left: ast.AST, right: ast.AST, pair: tuple[str, str], kind: str) -> None:
        """Replace the operator between two operands."""
        between = self._data[self._end(left) : self._start(right)].decode()
        words = r"\s+".join(re.escape(word) for word in pair[0].split())
        found = re.search(
            rf"\b{words}\b" if pair[0][0].isalpha() else words,
            re.sub("#.*", lambda comment: " " * len(comment.group()), between),
        )
        if found:
            at = self._end(left) + len(between[: found.start()].encode())
            self._edit(at, at + len(found.group()), pair[1], right, kind)

    # --- scopes, and what is not changed ---

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, bound = self._function, self._bound
        self._scope.append(node.name)
        self._function = ".".join(self._scope)
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        self._bound = {argument.arg for argument in every if argument is not None}
        for default in (*arguments.defaults, *arguments.kw_defaults):
            if default is not None:
                self.visit(default)
        self._scope.append("<locals>")
        for statement in node.body:
            self.visit(statement)
        del self._scope[-2:]
        self._function, self._bound = outer, bound

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scope.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self._scope.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Skip f-strings: before Python 3.12 the position of their expressions is unknown."""

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in QUIET_KEYWORDS:
            self.generic_visit(node)

    # --- statements ---

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in QUIET_CALLS:
            return
        if isinstance(node.value, ast.Call | ast.Yield | ast.YieldFrom):
            self._replace(node, "pass", "statement dropped")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if self._function:
            names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            stored = all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
            if stored or all(name in self._bound for name in names):
                self._replace(node, "pass", "statement dropped")
            self._bound |= set(names)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._replace(node, "pass", "statement dropped")
        symbol, other = ARITHMETIC.get(type(node.op), ("", ""))
        if symbol:
            self._operator(node.target, node.value, (f"{symbol}=", f"{other}="), "arithmetic")
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._replace(node, "pass", "statement dropped")

    def visit_Delete(self, node: ast.Delete) -> None:
        self._replace(node, "pass", "statement dropped")

    def visit_Break(self, node: ast.Break) -> None:
        self._replace(node, "continue", "loop")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._replace(node, "break", "loop")

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            if item.optional_vars is None:
                self._replace(item.context_expr, '__import__("contextlib").nullcontext()', "call removed")
        self.generic_visit(node)

    def _condition(self, test: ast.expr) -> None:
        if not isinstance(test, ast.Compare) and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
            self._replace(test, f"not ({self._text(test)})", "condition negated")

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            return
        self._condition(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._condition(test)
        self.generic_visit(node)

    # --- expressions ---

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, operation, right in zip(operands, node.ops, operands[1:], strict=False):
            self._operator(left, right, COMPARISONS[type(operation)], "comparison")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if pair := ARITHMETIC.get(type(node.op)):
            self._operator(node.left, node.right, pair, "arithmetic")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        pair = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._operator(left, right, pair, "boolean")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub | ast.Invert):
            self._replace(node, f"({self._text(node.operand)})", "sign or not")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._replace(node, str(not value), "constant")
        elif isinstance(value, int):
            self._replace(node, str(value + 1), "constant")
        elif isinstance(value, float):
            self._replace(node, str(2 * value or 1.0), "constant")
        elif isinstance(value, str) and DATA.fullmatch(value):
            quote = self._text(node).find(value[0])
            if quote > 0:
                at = self._start(node) + len(self._text(node)[:quote].encode())
                self._edit(at, at, "XX", node, "string")

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if ast.unparse(node.func) in QUIET_CALLS:
            return
        self._arguments(node)
        if name in TWINS:
            start = self._end(node.func) - len(name)
            self._edit(start, start + len(name), TWINS[name], node, "call")
        if isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
            self._replace(node, self._text(node.func.value), "call removed")
        if name in TRANSPARENT and len(node.args) == 1 and not node.keywords and isinstance(node.func, ast.Name):
            self._replace(node, f"({self._text(node.args[0])})", "call removed")
        self.generic_visit(node)

    def _arguments(self, node: ast.Call) -> None:
        """Drop each keyword argument; swap each two adjacent positional ones."""
        spans = [*node.args, *node.keywords]
        for index, keyword in enumerate(spans):
            if not isinstance(keyword, ast.keyword) or keyword.arg in QUIET_KEYWORDS:
                continue
            start = self._end(spans[index - 1]) if index else self._start(keyword)
            self._edit(start, self._end(keyword), "", keyword, "argument left out")
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        for first, second in zip(node.args, node.args[1:] if name not in COMMUTATIVE else [], strict=False):
            texts = self._text(first), self._text(second)
            if texts[0] != texts[1] and not any(isinstance(argument, ast.Starred) for argument in (first, second)):
                between = self._data[self._end(first) : self._start(second)].decode()
                self._edit(self._start(first), self._end(second), texts[1] + between + texts[0], first, "swapped")
