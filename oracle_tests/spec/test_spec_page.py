"""The rendered spec: every function is on it, equations are typeset, and it needs nothing from the network."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def spec() -> ModuleType:
    source = importlib.util.spec_from_file_location("spec", ROOT / "docs" / "spec.py")
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(spec: ModuleType) -> str:
    text: str = spec.page()
    return text


def test_every_file_and_definition_of_the_reference_is_on_it(page: str) -> None:
    for path in sorted((ROOT / "reference").rglob("*.py")):
        if path.stem.startswith("_"):
            continue
        anchor = ".".join(path.relative_to(ROOT / "reference").with_suffix("").parts)
        assert f'<section class="file" id="{anchor}">' in page
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert f'id="{anchor}.{node.name}"' in page


def test_every_link_within_the_page_leads_somewhere(page: str) -> None:
    links = set(re.findall(r'href="#([^"]+)"', page))
    assert links
    assert all(f'id="{link}"' in page for link in links)


def test_equations_are_typeset(page: str) -> None:
    assert page.count("<math") > 30
    assert "$$" not in page
    assert not re.search(r"\\(?:frac|sum|tilde|operatorname|tag|quad)", page)
    assert "s<sub>t</sub> = s<sub>f</sub>" in page
    assert "kept_total" in page
    assert "min<sub>rank</sub>" not in page, "a parameter, beside max_rank"
    for shown in (
        "floor<sub>l</sub>",
        "max<sub>b</sub>",
        "Q&#x27;<sub>k</sub>",
        "W<sub>ij</sub>²",
        "Q<sub>k</sub>ᵀ",
        "𝟏",
    ):
        assert shown in page, shown


def test_fractions_and_radicals_of_docstrings_are_typeset(spec: ModuleType, page: str) -> None:
    """Between the operators beside a slash; a bracket around all of a numerator is not shown."""

    def frac(above: str, below: str) -> str:
        return f'<span class="frac"><span>{above}</span><span>{below}</span></span>'

    sub = lambda letter, index: f"{letter}<sub>{index}</sub>"  # noqa: E731
    assert spec.formula("(k + 1) / (w + 1)  while k < w") == f"{frac('k + 1', 'w + 1')}  while k &lt; w"
    assert spec.formula("R̂ = R / Σ R,   I_l") == f"R̂ ={frac('R', 'Σ R')},   {sub('I', 'l')}"
    assert frac(sub("e", "l"), "Σ e") in spec.formula("clip(rint(e_l / Σ e · L · r̄), r_min)")
    both = spec.formula("e =  Σ_tok (D − S)²_{tok,c} / Σ_tok D²_{tok,c}")
    assert both == "e =  " + frac(
        f"{sub('Σ', 'tok')} (D − S)²<sub>tok,c</sub>", f"{sub('Σ', 'tok')} D²<sub>tok,c</sub>"
    )
    assert "/" not in spec.formula("⟨K, L⟩ / (‖K‖ ‖L‖)").replace("</span>", "")
    assert (
        spec.formula("a = √ Σ_t X²_t")
        == f'a = <span class="root">√<span>{sub("Σ", "t")} {sub("X²", "t")}</span></span>'
    )
    assert frac("2", "N") in spec.formula("H = 2/N Σ x xᵀ")
    assert frac("11ᵀ", "n") in spec.formula("H = I − 11ᵀ/n")
    assert spec.formula("4 (c // 32) + r // 8") == "4 (c // 32) + r // 8", "no division of numbers that are whole"
    assert page.count('class="frac"') > 10


def test_every_label_begins_a_paragraph(spec: ModuleType, page: str) -> None:
    shown = spec.prose("Do it.\n\nParameters: x `a/b`; n. Returns: y. Ties of I: the lower one. *Deviation*: none.")
    labels = [f'<p><span class="label">{name}:</span>' for name in ("Parameters", "Returns", "Deviation")]
    assert all(label in shown for label in labels)
    assert "<code>a/b</code>" in shown
    assert not re.search(r"[.] (?:Parameters|Returns|Errors|<em>Deviation</em>):", page)


def test_a_long_line_of_code_goes_on_further_in(spec: ModuleType) -> None:
    def starts(code: str, console: bool = False) -> list[str]:
        return re.findall(r'style="--in:(\d+)">', spec.coloured(code, console))

    assert starts('if a:\n    b = """c\n  d"""\n') == ["0", "4", "2"]
    assert starts(">>> a\n...     b\n  1\n", console=True) == ["4", "8", "2"]


def test_nothing_is_cut_off_and_the_picture_is_on_it(page: str) -> None:
    style = page[page.index("<style>") : page.index("</style>")]
    assert "white-space: pre-wrap" in style[style.rindex("\npre { ") :].splitlines()[1]
    assert "nowrap" not in style
    assert page.count("<svg") == 1


def test_nothing_is_fetched(page: str) -> None:
    assert not re.search(r"(?:src|srcset)=|<link|<script|@import|url\((?!#)", page)
    assert "https://" not in re.sub(r'<a href="https://[^"]*"', "", page)


def test_markup_is_balanced(page: str) -> None:
    for tag in ("pre", "div", "article", "section", "math", "table", "code"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_a_wrong_number_in_the_worked_example_stops_it(
    spec: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (ROOT / "reference" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "README.md").write_text(
        guide.replace("(0.6552, 0.03)", "(0.6553, 0.03)"), encoding="utf-8"
    )
    monkeypatch.setattr(spec, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="1 examples fail"):
        spec.guide()
    assert "0.6552" in capsys.readouterr().out
