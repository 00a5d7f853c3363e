"""The first token's weight in the statistics that prune: where it counts, and where it cannot. Whole runs: test_whole_run.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from oracle_tests.small_runs import arguments, fails, make_place
from oracle_tests.whole_runs import PLAIN, run_production, special
from reference import losa as reference_losa
from torch_impl.commands import compare


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps", "admm"])
def test_it_counts_for_q_k_and_v_alone(method: str) -> None:
    """In the first block, whose inputs are the same in both runs."""
    case = special(prune_method=method, steps=1, finetune=False, layer_sparsity="uniform")
    plain, weighed = (
        run_production(replace(case, settings=replace(case.settings, first_token_weight=weight)))
        for weight in (1.0, 80.0)
    )
    parted = {name for name, weight in plain.merged[0].items() if not np.array_equal(weight, weighed.merged[0][name])}
    assert parted <= {"q", "k", "v"}
    assert parted, "else the comparison says nothing"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prune_method": "magnitude"}, ["first_token_weight is 50, and prune_method magnitude", "wanda, sparsegpt, alps or admm"]),
        ({"prune_method": "pruner_zero"}, ["first_token_weight is 50, and prune_method pruner_zero"]),
        ({"sparsity_type": "structured"}, ["first_token_weight is 50, and sparsity_type structured", "leave one of them out"]),
        ({"first_token_weight": -1}, ["first_token_weight is -1.0; allowed: 0.0 to 1000000.0"]),
    ],
)  # fmt: skip
def test_where_it_would_do_nothing(
    changes: dict[str, object], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = make_place(tmp_path)
    fails(capsys, place, arguments(place, **{"first_token_weight": 50, **changes}), words)


@pytest.mark.parametrize(
    "changes", [{"prune_method": "magnitude"}, {"prune_method": "pruner_zero"}, {"sparsity_type": "structured"}]
)
def test_the_spec_refuses_the_same(changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"first_token_weight is 50\.0; allowed with prune_method"):
        replace(PLAIN.settings, first_token_weight=50.0, **changes)
    assert isinstance(replace(PLAIN.settings, first_token_weight=1.0, **changes), reference_losa.Settings)


def test_a_comparison_varies_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    place = make_place(tmp_path)
    file = tmp_path / "weights.toml"
    file.write_text('[[matrix]]\nsparsity = ["2:4"]\nfirst_token_weight = [1, 50]\nrecipes = ["none"]\n')
    given = arguments(place, output_dir=None, learning_rate=None, steps=None, prune_method="sparsegpt")
    assert compare.main([str(file), *given, "--output", str(tmp_path / "out"), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["dense, seed 0", "2:4, 1, none, seed 0", "2:4, 50, none, seed 0", "3 runs"]
    magnitude = ["magnitude" if word == "sparsegpt" else word for word in given]
    assert compare.main([str(file), *magnitude, "--output", str(tmp_path / "out"), "--dry_run"]) == 2
    assert "first_token_weight is 50, and prune_method magnitude" in capsys.readouterr().err
