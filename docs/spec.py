"""Render the spec as one HTML page: the guide, then each file with its docstrings beside its code.

    python docs/spec.py [build/spec.html]

The page loads nothing from the network: equations become MathML, code is highlighted, and styles are inline. The worked
example is run first. If its numbers are wrong, no page is written.
"""

from __future__ import annotations

import ast
import doctest
import html
import re
import sys
import textwrap
from pathlib import Path

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonConsoleLexer, PythonLexer

ROOT = Path(__file__).parents[1]
# In the order of reading.
FILES = (
    "schedule", "hsic", "rmi", "first_order", "sparsity", "owl", "atp", "lamp",
    "masks/select", "masks/nm", "masks/pattern", "masks/method", "masks/first_token", "masks/magnitude", "masks/wanda",
    "masks/sparsegpt",
    "masks/least_squares", "masks/alps", "masks/admm", "masks/pruner_zero", "masks/taylor", "masks/structured",
    "masks/prune",
    "adapter", "rank", "reconstruct", "continuation",
    "packed", "quantise", "bits", "base", "tiles", "code_tiles", "gaps",
    "layers", "loss", "llama", "adamw",
    "sora", "sleb", "slicegpt", "llm_pruner", "loraprune", "flap",
    "rates", "settings", "adapted_linear", "lockstep", "training", "losa",
)  # fmt: skip
STYLE = """
:root { --ink: #1d2330; --soft: #5b6475; --paper: #fdfdfb; --panel: #f3f3ee; --line: #dddcd4; --accent: #7a3b12; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4dd; --soft: #9aa1ad; --paper: #16181d; --panel: #1f2229; --line: #343842; --accent: #e0a070; }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 5rem; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
nav { position: sticky; top: 0; z-index: 1; padding: .4rem 1.5rem; background: var(--paper); font-size: .85rem;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .1rem .8rem; }
nav span { color: var(--soft); margin-right: -.6rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
main { max-width: 96rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
.picture { overflow-x: auto; }
.picture svg { display: block; max-width: 64rem; min-width: 40rem; width: 100%; height: auto; margin: 1rem auto;
  border-radius: 8px; }
.guide h1 { margin-top: 1rem; }
h2 { margin-top: 2.5rem; }
h3 { margin: 0 0 .5rem; font: 600 1rem ui-monospace, monospace; }
table { border-collapse: collapse; }
td, th { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
math[display="block"] { margin: .9rem 0; overflow: auto hidden; padding: .3rem 0; font-size: 1.1em; }
.equation { display: flex; align-items: center; gap: 1rem; } .equation math { flex: 1; }
.equation span { color: var(--soft); }
section.file { margin-top: 3.5rem; border-top: 2px solid var(--accent); }
section.file > p { color: var(--soft); }
article { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1.3fr); gap: 1.5rem; padding: 1.2rem 0;
  border-top: 1px solid var(--line); }
article p { margin: .4rem 0; }
article > div > pre:first-child { margin-top: 0; }
@media (max-width: 60rem) { nav, article { position: static; } article { grid-template-columns: minmax(0, 1fr); }
  html { scroll-padding-top: 1rem; } }
@media print { nav { position: static; } article { break-inside: avoid; } }
pre { margin: .5rem 0; padding: .7rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 6px;
  background: var(--panel);
  font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
/* A long line goes on further in than it began. */
pre .line { display: block; min-height: 1.5em;
  padding-left: calc((var(--in) + 4) * 1ch); text-indent: calc((var(--in) + 4) * -1ch); }
pre.formula { background: none; border-left: 3px solid var(--accent); border-radius: 0; font: italic 1.05rem/1.6 "STIX Two Math",
  "Cambria Math", Cambria, "Times New Roman", serif; }
.frac { display: inline-flex; flex-direction: column; margin: 0 .25em; vertical-align: middle; text-align: center;
  line-height: 1.25; }
.frac > span:first-child { border-bottom: 1px solid currentColor; padding: 0 .25em; } .frac > span:last-child { padding: 0 .25em; }
.root > span { border-top: 1px solid currentColor; padding: 0 .15em; }
.label { color: var(--soft); font-weight: 600; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .88em; }
"""
# A letter or one of a few words with a subscript: s_t, X²_{tok,j}, mask_j, but not kept_total.
SUBSCRIPT = re.compile(
    r"((?<!\w)Δ?\w[\u0300-\u036f]*(?:'|&#x27;)?[²³]?|[)Σ][²³]?|(?<!\w)(?:lo|hi|min|max|mean|mask|score|ceiling|floor|harm|wanted|"
    r"offsets|removed)(?=_(?:\{|\w{1,2}\b)))_(\{[^}]*\}|⌊[^⌋]*⌋|(?:(?![ᵀ²³])\w)+)"
)
# What a formula is made of: brackets with what they hold, words, and what separates factors.
ATOM = re.compile(r"√ ?|\(|\)|⟨[^⟩]*⟩|(?:\{[^}]*\}|[^\s()√=,;·±×⊙⇒+−{}])+|[{}]|\s{2,}|\s|[=,;·±×⊙⇒+−]")
SEPARATES = re.compile(
    r"\s{2,}|[=,;·±×⊙⇒+−]|of|over|where|from|then|may|subject|to|min|a|one|per|is|has|row|rows|the|for"
)
_NAMES = r"(?:Source|Parameters|Returns|Ties[^:.]*|Errors|\*Deviation\*|Bounds|Attributes):"
LABELS = re.compile(rf"^{_NAMES}")
# Between a sentence and a label behind it.
BEFORE_LABEL = re.compile(rf"(?<=[.;]) (?={_NAMES})")


def coloured(code: str, console: bool = False) -> str:
    """Highlight code, or an interpreter session with its output."""
    inside = highlight(code, PythonConsoleLexer() if console else PythonLexer(), HtmlFormatter(nowrap=True))
    lines = (
        f'<span class="line" style="--in:{_indentation(re.sub("<[^>]*>", "", line), console)}">{line}</span>'
        for line in inside.rstrip("\n").split("\n")
    )
    return f'<pre class="highlight">{"".join(lines)}</pre>'


def _indentation(line: str, console: bool) -> int:
    """Return the number of characters before the code of a line; a prompt counts if there is code behind it."""
    line = html.unescape(line)
    begun = re.match(r"(?:>>>|\.\.\.)? *" if console else " *", line)
    return len(begun[0]) if begun else 0


def colours(style: str) -> str:
    """Return the CSS for the classes of `coloured` in one pygments style."""
    return str(HtmlFormatter(style=style, nobackground=True).get_style_defs(".highlight"))


def equation(source: str, options: dict[str, bool]) -> str:
    """Convert LaTeX to MathML; a \\tag becomes the number beside the equation."""
    tag = re.search(r"\\tag\{([^}]*)\}", source)
    source = re.sub(r"\\tag\{[^}]*\}", "", source)
    # Browsers do not show bold digits of MathML.
    for latex, ours in (("\\tfrac", "\\frac"), ("\\operatorname*", "\\operatorname"), ("\\mathbf 1", "𝟏")):
        source = source.replace(latex, ours)
    mathml = convert(source.strip(), display="block" if options.get("display_mode") else "inline")
    return f'<div class="equation">{mathml}<span>({tag[1]})</span></div>' if tag else mathml


def guide() -> str:
    """Render reference/README.md after running its worked example."""
    path = ROOT / "reference" / "README.md"
    failed = doctest.testfile(str(path), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE).failed
    if failed:
        raise SystemExit(f"{path.name}: {failed} examples fail; correct the numbers in the worked example")
    markdown = MarkdownIt("commonmark", {"highlight": lambda code, _, __: coloured(code, console=">>>" in code)})
    markdown.enable("table").use(dollarmath_plugin, renderer=equation)
    return str(markdown.render(path.read_text(encoding="utf-8")))


def typeset(text: str) -> str:
    """Turn the subscripts of a docstring's notation (r_max, X²_{tok,j}, mask_j) into HTML."""
    return SUBSCRIPT.sub(lambda m: f"{m[1]}<sub>{m[2].strip('{}')}</sub>", html.escape(text))


def formula(line: str) -> str:
    """Typeset one line of a formula: subscripts, fractions for ` / `, and radicals.

    A numerator or denominator is what stands beside the slash without an operator between: Σ w ρ / Σ w, (n − k) / (n − w).
    """
    parts = _factors(line)
    shown: list[str] = []
    index = 0
    while index < len(parts):
        if parts[index] == "/" and shown and shown[-1].strip() and index + 1 < len(parts):
            shown[-1] = _fraction(_inside(shown[-1]), _inside(parts[index + 1]))
            index += 2
        else:
            shown.append(parts[index])
            index += 1
    return "".join(shown)


def _fraction(above: str, below: str) -> str:
    return f'<span class="frac"><span>{above}</span><span>{below}</span></span>'


def _factors(line: str) -> list[str]:
    """Split a line at its operators into typeset runs of factors; ` / ` between two of them is a part of its own."""
    atoms = ATOM.findall(line)
    parts, run, index = [""], "", 0
    while index < len(atoms):
        atom = atoms[index]
        if atom == "(":
            end = _closing(atoms, index)
            suffix = atoms[end + 1] if end + 1 < len(atoms) and re.match(r"[²³_ᵀ⁻]", atoms[end + 1]) else ""
            run += f"({formula(''.join(atoms[index + 1 : end]))}){typeset(')' + suffix)[1:]}"
            index = end + 1 + bool(suffix)
            continue
        if atom.startswith("√"):
            rest = "".join(atoms[index + 1 :])
            radicand = re.match(r"\([^)]*\)|Σ\S* \S+|\w+", rest)
            under = radicand[0] if radicand else ""
            run += f'<span class="root">√<span>{typeset(under.strip("()"))}</span></span>'
            atoms = [*atoms[: index + 1], *ATOM.findall(rest[len(under) :])]
        elif atom == "/" and index and atoms[index - 1] == " ":
            parts += [run.strip(), "/"]
            run = ""
        elif SEPARATES.fullmatch(atom):
            parts += [run, html.escape(atom)]
            run = ""
        elif tight := re.fullmatch(r"([\wᵀ]+)/(\w+)", atom):
            run += _fraction(*map(typeset, tight.groups()))
        else:
            run += typeset(atom)
        index += 1
    return [part for part in [*parts, run] if part]


def _closing(atoms: list[str], start: int) -> int:
    """Return the index of the bracket that closes the one at `start`, or of the last atom."""
    depth = 0
    for index in range(start, len(atoms)):
        depth += (atoms[index] == "(") - (atoms[index] == ")")
        if not depth:
            return index
    return len(atoms) - 1


def _inside(part: str) -> str:
    """Return a numerator or denominator without brackets around all of it."""
    part = part.strip()
    whole = (
        part.startswith("(")
        and part.endswith(")")
        and _closing(re.findall(r"\(|\)|[^()]+", part), 0) == len(re.findall(r"\(|\)|[^()]+", part)) - 1
    )
    return part[1:-1] if whole else part


def prose(docstring: str) -> str:
    """Render a docstring: paragraphs, indented lines as formulas, examples as an interpreter session."""
    parts = []
    for block in filter(None, re.split(r"\n\s*\n", docstring.strip("\n"))):
        if block.lstrip().startswith(">>>"):
            parts.append(coloured(block, console=True))
        elif all(line.startswith("    ") for line in block.splitlines()):
            # Indented pseudo-code names files; other indented text is a formula.
            kind = "box" if ".py" in block else "formula"
            typesetter = typeset if kind == "box" else formula
            lines = (_code(typesetter(line)) for line in textwrap.dedent(block).splitlines())
            parts.append(f'<pre class="{kind}">{chr(10).join(lines)}</pre>')
        else:
            paragraph = " ".join(line.strip() for line in block.splitlines())
            for text in map(typeset, BEFORE_LABEL.split(paragraph)):
                text = LABELS.sub(lambda m: f'<span class="label">{m[0].replace("*", "")}</span>', text)
                text = _code(text)
                text = re.sub(r"[*]([^*]+)[*]", r"<em>\1</em>", text)
                parts.append(f"<p>{text}</p>")
    return "\n".join(parts)


def _code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def without_docstring(source: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    """Return the source lines of a definition without its docstring."""
    lines = source.splitlines()
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = lines[first - 1 : node.end_lineno]
    body = node.body[0]
    if ast.get_docstring(node) and body.end_lineno is not None:
        kept = kept[: body.lineno - first] + kept[body.end_lineno - first + 1 :]
    return "\n".join(kept)


def file_section(name: str) -> str:
    """Render one file of the spec: each definition with its docstring on the left and its code on the right."""
    source = (ROOT / "reference" / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    anchor = name.replace("/", ".")
    parts = [f'<section class="file" id="{anchor}"><h2>{name}.py</h2>', prose(ast.get_docstring(tree) or "")]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            words = prose(ast.get_docstring(node) or "")
            code = coloured(without_docstring(source, node))
            parts.append(
                f'<article id="{anchor}.{node.name}"><div><h3>{node.name}</h3>{words}</div><div>{code}</div></article>'
            )
    return "\n".join([*parts, "</section>"])


def menu() -> str:
    """Link to every file, with the name of a folder once."""
    links, before = [], ""
    for name in FILES:
        folder, _, file = name.rpartition("/")
        if folder and folder != before:
            links.append(f"<span>{folder}/</span>")
        links.append(f'<a href="#{name.replace("/", ".")}">{file}</a>')
        before = folder
    return " ".join(links)


def page() -> str:
    """Render the whole page."""
    palette = f"{colours('default')}\n@media (prefers-color-scheme: dark) {{\n{colours('monokai')}\n}}"
    sections = "\n".join(file_section(name) for name in FILES)
    picture = (ROOT / "docs" / "method.svg").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>LoSA, file by file</title><style>{palette}
{STYLE}</style></head>
<body><nav><a href="#top">guide</a> {menu()}</nav><main id="top"><div class="picture">{picture}</div>{guide()}
{sections}</main></body></html>
"""


def main() -> None:
    """Write the page."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "spec.html")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(), encoding="utf-8")
    print(f"{target}: {len(FILES)} files, {target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
