"""HSIC and mutual information against double loops, features and invariances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from oracle_tests import strategies
from reference import hsic, rmi


@given(strategies.gram_pairs())
def test_hsic_is_the_double_loop(case: dict[str, np.ndarray]) -> None:
    """tr(K H L H) written out with explicit means."""
    K, L = case["gram_x"], case["gram_y"]
    n, total = len(K), 0.0
    for i in range(n):
        for j in range(n):
            centred = K[i, j] - K[i].mean() - K[:, j].mean() + K.mean()
            total += centred * (L[i, j] - L[i].mean() - L[:, j].mean() + L.mean())
    scale = np.linalg.norm(K) * np.linalg.norm(L) + 1e-300
    assert abs(hsic.hsic(K, L) - total / (n - 1) ** 2) <= 1e-12 * scale


@pytest.mark.parametrize("seed", range(5))
def test_nhsic_is_cka_of_centred_features(seed: int) -> None:
    """CKA = ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of features with their means taken off: no Gram matrix in sight."""
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((7, 4)), rng.standard_normal((7, 9))
    Xc, Yc = X - X.mean(0), Y - Y.mean(0)
    cka = np.linalg.norm(Yc.T @ Xc) ** 2 / (np.linalg.norm(Xc.T @ Xc) * np.linalg.norm(Yc.T @ Yc))
    assert hsic.nhsic(hsic.linear_gram(X), hsic.linear_gram(Y)) == pytest.approx(cka, rel=1e-12)
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    moved = 3.0 * X @ rotation + 5.0
    assert hsic.nhsic(hsic.linear_gram(moved), hsic.linear_gram(X)) == pytest.approx(1.0, abs=1e-10)


@given(strategies.grams(5))
def test_matrix_properties(grams: np.ndarray) -> None:
    matrix = rmi.nhsic_matrix(grams)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(np.diag(matrix), 1.0)
    assert ((matrix >= 0) & (matrix <= 1)).all()


def test_constant_features_share_nothing() -> None:
    rng = np.random.default_rng(0)
    constant = np.tile(rng.standard_normal(6) * 1e3, (5, 1))
    matrix = rmi.nhsic_matrix(
        np.stack([hsic.linear_gram(x) for x in (constant, rng.standard_normal((5, 3)), constant)])
    )
    np.testing.assert_array_equal(matrix, np.eye(3))
    np.testing.assert_allclose(rmi.importance(rmi.redundancy(matrix)), np.exp(-1 / 3))


def test_one_block_like_all_others_is_least_important() -> None:
    matrix = np.array([[1, 0.9, 0.8], [0.9, 1, 0.1], [0.8, 0.1, 1]])
    importance = rmi.importance(rmi.redundancy(matrix))
    assert importance.argmin() == 0
    assert (np.argsort(rmi.importance(rmi.redundancy(matrix), beta=100)) == np.argsort(importance)).all()
