"""Algorithm 1 in NumPy: its lines against definitions written differently, its runs against what must always hold."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from oracle_tests.llama_pair import random_llama
from oracle_tests.strategies import examples
from reference import adapted_linear, adapter, llama, lockstep, losa, rates, training
from reference.loss import IGNORED
from reference.masks.prune import METHODS
from reference.settings import Settings

SIZES = llama.Sizes(vocabulary=13, hidden=8, intermediate=12, heads=4, kv_heads=2)
QUICK = Settings(
    steps=3, initial_rank=2, max_rank=6, rmi_samples=4, learning_rate=1e-2, batch_size=2, sparsity_ratio=0.6, seed=3
)


def model(blocks: int = 4, seed: int = 0) -> llama.Llama:
    return random_llama(SIZES, blocks, tied=False, seed=seed)


def ids(shape: tuple[int, int] = (5, 6), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(SIZES.vocabulary, size=shape)


def parts(steps: int, seed: int = 1, examples: int = 4) -> list[list[losa.Example]]:
    """Sequences of unequal length, the first tokens of each without a label."""
    generator = np.random.default_rng(seed)

    def example() -> losa.Example:
        row = generator.integers(SIZES.vocabulary, size=generator.integers(3, 8))
        labels = row.copy()
        labels[: generator.integers(0, 2)] = IGNORED
        return {"input_ids": row, "labels": labels}

    return [[example() for _ in range(examples)] for _ in range(steps)]


def zeros_per_group(mask: np.ndarray, m: int) -> np.ndarray:
    return (~mask).reshape(len(mask), -1, m).sum(axis=-1)


@hypothesis_settings(deadline=None, max_examples=examples(12))
@given(
    method=st.sampled_from(list(METHODS)),
    pattern=st.sampled_from(["unstructured", "2:4", "mixed-2:4"]),
    shrink=st.sampled_from(["truncate", "fold"]),
    seed=st.integers(0, 99),
)
def test_what_holds_in_every_run(method: str, pattern: str, shrink: str, seed: int) -> None:
    settings = replace(QUICK, prune_method=method, sparsity_type=pattern, rank_shrink=shrink, seed=seed)
    dense = model(seed=seed)
    merged, records = losa.run(dense, ids(), parts(3), settings)
    previous = adapted_linear.attach_adapters(dense)
    for record in records:
        assert [len(layer.A) for block in record.layers for layer in block.values()] == np.repeat(
            record.ranks, 7
        ).tolist()
        assert sum(record.ranks) == 4 * (record.step + 1)
        if pattern == "unstructured":
            assert np.mean(record.sparsity) == pytest.approx(record.target, abs=1e-12)
        for index, block in enumerate(record.layers):
            for name, layer in block.items():
                assert not (layer.mask & ~previous[index][name].mask).any(), "masks nest"
                if pattern != "unstructured":
                    assert set(zeros_per_group(layer.mask, 4).flat) == {round(4 * record.sparsity[index])}
        previous = record.layers
    for block, layers in zip(merged.blocks, previous, strict=True):
        for name, layer in layers.items():
            assert (block.weights[name][~layer.mask] == 0).all()
    for before, after in zip(dense.blocks, model(seed=seed).blocks, strict=True):
        np.testing.assert_equal(before.weights, after.weights)  # nothing is changed in place


def test_settings_out_of_the_algorithm_s_way() -> None:
    """Uniform rates, uniform ranks, no training: each falls back to the plain rule."""
    settings = replace(QUICK, layer_sparsity="uniform", rank_allocation="uniform", sparsity_ratio=0.5)
    _, records = losa.run(model(2), ids(), parts(3), settings)
    for record in records:
        assert record.importance == []
        assert record.sparsity == [record.target] * 2
        assert record.ranks == [record.step + 1] * 2
    _, records = losa.run(model(), ids(), [], replace(QUICK, finetune=False, sparsity_type="2:4"))
    assert [(record.ranks, record.losses) for record in records] == [([], [])] * 3
    assert [record.sparsity for record in records] == [[0.25] * 4, [0.5] * 4, [0.5] * 4]  # 4 · (.35, .48, .5) zeros


def test_importance_by_a_double_sum() -> None:
    """HSIC = Σ over pairs of samples of the two centred kernels' products, without a matrix."""
    dense, tokens = model(3), ids((4, 5))
    outputs = [block.output.reshape(4, -1) for block in llama.forward(dense, tokens).blocks]
    centred = [features - features.mean(axis=0) for features in outputs]

    def cross(x: np.ndarray, y: np.ndarray) -> float:
        return sum((x[a] @ x[b]) * (y[a] @ y[b]) for a in range(4) for b in range(4))

    shared = [
        sum(cross(x, y) / math.sqrt(cross(x, x) * cross(y, y)) for j, y in enumerate(centred) if j != i)
        for i, x in enumerate(centred)
    ]
    expected = [math.exp(-value / sum(shared)) for value in shared]
    np.testing.assert_allclose(rates.mutual_information(dense, tokens), expected, rtol=1e-10)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_blocks_are_pruned_on_inputs_from_pruned_blocks(method: str) -> None:
    """The second block sees what the pruned first one makes of the tokens; errors compare the two streams."""
    dense, tokens = model(3), ids()
    settings = replace(QUICK, prune_method=method, layer_sparsity="uniform", steps=1, finetune=False)
    merged, [record] = losa.run(dense, tokens, [], settings)
    half_pruned = replace(dense, blocks=(merged.blocks[0], *dense.blocks[1:]))
    x = llama.forward(half_pruned, tokens).blocks[1].inputs["qkv"].reshape(-1, SIZES.hidden)
    if method == "wanda":
        score = np.abs(dense.blocks[1].weights["k"]) * np.sqrt((x**2).sum(axis=0))
        cut = np.sort(score, axis=1)[:, [math.floor(0.6 * 8)]]
        np.testing.assert_array_equal(record.layers[1]["k"].mask, score >= cut)
    else:
        # SparseGPT moves what it keeps: the output error must be below that of its mask alone.
        new, old = merged.blocks[1].weights["k"], dense.blocks[1].weights["k"]
        mask = record.layers[1]["k"].mask
        assert np.linalg.norm(x @ (new - old).T) < np.linalg.norm(x @ (old * mask - old).T)
    D = llama.forward(dense, tokens).blocks[2].output.reshape(-1, SIZES.hidden)
    S = llama.forward(merged, tokens).blocks[2].output.reshape(-1, SIZES.hidden)
    assert record.errors[2] == pytest.approx((((D - S) ** 2).sum(0) / (D**2).sum(0)).mean(), rel=1e-10)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_gradients_of_an_optimizer_step_by_finite_differences(loss: str) -> None:
    dense = model(3, seed=5)
    settings = replace(QUICK, loss=loss)
    layers, _ = lockstep.prune_model(
        dense, adapted_linear.attach_adapters(dense), ids(), settings, np.full(3, 0.5), [None] * 3
    )
    layers = adapted_linear.resize(layers, [2, 3, 1], 1, settings)
    generator = np.random.default_rng(6)
    values = [P + 0.1 * generator.normal(size=P.shape) for P in adapted_linear.parameters(layers)]
    directions = [generator.normal(size=P.shape) for P in values]
    length = math.sqrt(sum((D**2).sum() for D in directions))
    [batch] = parts(1)

    def at(h: float) -> float:
        moved = adapted_linear.with_parameters(
            layers, [P + h * D / length for P, D in zip(values, directions, strict=True)]
        )
        return training.loss_and_gradients(dense, moved, batch, settings)[0]

    _, gradients = training.loss_and_gradients(dense, adapted_linear.with_parameters(layers, values), batch, settings)
    slope = sum((G * D).sum() for G, D in zip(gradients, directions, strict=True)) / length
    # Central difference, step 1e-4: truncation about 1e-8, rounding 1e-16 / 1e-4.
    assert slope == pytest.approx((at(1e-4) - at(-1e-4)) / 2e-4, rel=1e-6)


def test_loss_is_per_predicted_token_of_the_whole_step() -> None:
    dense = model(3)
    layers = adapted_linear.attach_adapters(dense)
    [batch] = parts(1)
    loss, _ = training.loss_and_gradients(dense, layers, batch, QUICK)
    nll, count = 0.0, 0
    for example in batch:
        logits = llama.forward(dense, example["input_ids"][None]).logits[0]
        for position, label in enumerate(example["labels"][1:]):
            if label != IGNORED:
                nll -= math.log(np.exp(logits[position, label]) / np.exp(logits[position]).sum())
                count += 1
    assert loss == pytest.approx(nll / count, rel=1e-12)
    kl, gradients = training.loss_and_gradients(dense, layers, batch, replace(QUICK, loss="kl"))
    assert kl == pytest.approx(0, abs=1e-14)
    assert all(not G.any() for G in gradients)  # rank 0


def test_training_learns_and_starts_afresh_each_step() -> None:
    dense = model(seed=7)
    settings = replace(QUICK, steps=1, warmup_ratio=0.0, max_grad_norm=1.0, learning_rate=3e-2)
    part = parts(1)[0] * 10
    _, [record] = losa.run(dense, ids(), [part], settings)
    assert np.mean(record.losses[-4:]) < 0.7 * np.mean(record.losses[:4])
    positions = training.lr_positions([part, part[:3]], settings)
    assert positions == [(0, 20), (0, 2)]
    assert training.lr_positions([part, part[:3]], replace(settings, lr_schedule="whole_run")) == [(0, 22), (20, 22)]


@pytest.mark.parametrize(("pattern", "steps", "idle"), [("1:2", 5, 1), ("3:4", 5, 1), ("7:8", 5, 1), ("4:4", 3, 3)])
def test_where_nothing_is_pruned_yet_nothing_is_trained(pattern: str, steps: int, idle: int) -> None:
    """Against the dense model's own predictions; labels have more to say."""
    settings = replace(QUICK, sparsity_type=pattern, steps=steps, layer_sparsity="uniform", warmup_ratio=0.0)
    dense = random_llama(replace(SIZES, intermediate=16), 3, tied=False, seed=2)
    _, records = losa.run(dense, ids(), parts(steps), replace(settings, loss="kl"))
    assert [bool(record.losses) for record in records] == [step >= idle for step in range(steps)]
    for record in records[:idle]:
        assert sum(record.ranks) == 3 * (record.step + 1), "adapters grow as ever"
        for block, layers in zip(dense.blocks, record.layers, strict=True):
            for name, layer in layers.items():
                np.testing.assert_array_equal(layer.merged(2.0), block.weights[name])
    _, records = losa.run(dense, ids(), parts(steps), settings)
    assert all(record.losses for record in records)


def test_zeros_that_were_there_before_are_nothing_to_heal() -> None:
    """The model that a run starts from is the one it is held against."""
    settings = replace(QUICK, steps=2, sparsity_ratio=0.5, loss="kl", layer_sparsity="uniform", warmup_ratio=0.0)
    sparse, _ = losa.run(model(), ids(), [], replace(settings, finetune=False))
    _, records = losa.run(sparse, ids(), parts(2), settings)
    assert [record.losses for record in records] == [[], []]
    _, records = losa.run(sparse, ids(), parts(2), replace(settings, sparsity_ratio=0.7))
    assert all(record.losses for record in records)


def test_ranks_grow_and_shrink_without_moving_what_they_should_not() -> None:
    dense = model(3)
    generator = np.random.default_rng(8)
    layers = adapted_linear.resize(adapted_linear.attach_adapters(dense), [3, 3, 3], 1, QUICK)
    layers = adapted_linear.with_parameters(
        layers, [generator.normal(size=P.shape) for P in adapted_linear.parameters(layers)]
    )
    grown = adapted_linear.resize(layers, [4, 5, 3], 2, QUICK)
    folded = adapted_linear.resize(layers, [1, 2, 3], 2, replace(QUICK, rank_shrink="fold"))
    cut = adapted_linear.resize(layers, [1, 2, 3], 2, QUICK)
    for index, block in enumerate(layers):
        for number, (name, layer) in enumerate(block.items()):
            merged = layer.merged(2.0)
            np.testing.assert_allclose(grown[index][name].merged(2.0), merged, atol=1e-14)
            np.testing.assert_allclose(folded[index][name].merged(2.0), merged, atol=1e-13)
            np.testing.assert_array_equal(cut[index][name].weight, layer.weight)
            np.testing.assert_array_equal(cut[index][name].A, layer.A[: [1, 2, 3][index]])
            rows = adapter.initial_rows([1, 2, 0][index], layer.A.shape[1], (QUICK.seed, 2, index, number))
            np.testing.assert_array_equal(grown[index][name].A[3:], rows)


def test_an_already_sparse_model_goes_on_from_where_it_is() -> None:
    once, _ = losa.run(model(), ids(), [], replace(QUICK, steps=1, sparsity_ratio=0.5, finetune=False))
    _, records = losa.run(once, ids(), [], replace(QUICK, sparsity_ratio=0.6, finetune=False))
    start = np.mean(adapted_linear.zero_shares(adapted_linear.attach_adapters(once)))
    for record in records:
        assert record.target == pytest.approx(0.6 + (start - 0.6) * (1 - record.step / 3) ** 3)
    with pytest.raises(ValueError, match=r"sparsity_ratio is 0.3; allowed: 0\.\d+ or more, the model"):
        losa.run(once, ids(), [], replace(QUICK, sparsity_ratio=0.3, finetune=False))
    few = model()
    few.blocks[0].weights["q"][0, 0] = 0.0
    _, [record] = losa.run(few, ids(), [], replace(QUICK, steps=1, sparsity_ratio=0.0, finetune=False))
    assert record.sparsity == [0.0] * 4


@pytest.mark.parametrize("layer_sparsity", list(rates.RULES))
def test_silent_rows_count_as_pruned(layer_sparsity: str) -> None:
    """Half of the rows, all of one block's q, or most of one block are zero: the total is what was asked for."""
    rows, projection, block = model(), model(), model()
    for weight in (weight for of_block in rows.blocks for weight in of_block.weights.values()):
        weight[: len(weight) // 2] = 0
    projection.blocks[1].weights["q"][:] = 0
    for weight in block.blocks[2].weights.values():
        weight[:, 1:] = 0
    for sparse in (rows, projection, block):
        settings = replace(QUICK, layer_sparsity=layer_sparsity, finetune=False)
        _, records = losa.run(sparse, ids(), [], settings)
        sizes = [sum(weight.size for weight in block.weights.values()) for block in sparse.blocks]
        share = np.average(records[-1].realised, weights=sizes)
        # Whole weights of rows of eight inputs or more.
        assert settings.sparsity_ratio - 1 / 8 < share <= settings.sparsity_ratio


def test_same_seed_same_run_and_another_seed_another() -> None:
    first, second, other = (
        losa.run(model(), ids(), parts(3), replace(QUICK, seed=seed))[0].blocks[0].weights["q"] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_diverging_training_stops() -> None:
    settings = replace(QUICK, steps=1, warmup_ratio=0.0, learning_rate=1e200)
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="optimizer step 2: loss nan"):
        losa.run(model(), ids(), parts(1), settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune_method": "random"}, f"prune_method is 'random'; allowed: {', '.join(METHODS)}"),
        ({"layer_sparsity": "x"}, "layer_sparsity is 'x'; allowed: rmi, uniform, owl, atp, lamp, gradient"),
        ({"rank_allocation": "x"}, "rank_allocation is 'x'; allowed: error, uniform"),
        ({"rank_shrink": "x"}, "rank_shrink is 'x'; allowed: truncate, fold"),
        ({"adapted": "x"}, "adapted is 'x'; allowed: all, attention, mlp"),
        ({"lr_schedule": "x"}, "lr_schedule is 'x'; allowed: per_step, whole_run"),
        ({"loss": "x"}, "loss is 'x'; allowed: ce, kl"),
        ({"sparsity_type": "2of4"}, "sparsity_type is '2of4'; allowed: unstructured, N:M, mixed-N:M, structured"),
        ({"sparsity_type": "5:4"}, "sparsity_type is '5:4'; allowed: N from 1 to M"),
        ({"sparsity_ratio": 1.0}, "sparsity_ratio is 1.0; allowed: 0 up to, not including, 1"),
        ({"rmi_samples": 1}, "rmi_samples is 1; allowed: 2 or more"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; allowed: a finite number"),
        ({"lora_alpha": 0.0}, "lora_alpha is 0.0; allowed: above 0"),
        ({"steps": 0}, "steps is 0; allowed: 1 or more"),
        ({"steps": 9}, "steps is 9; allowed: 1 to 5"),
        ({"initial_rank": 7}, "initial_rank is 7; allowed: 1 to 6"),
        ({"batch_size": 0}, "batch_size is 0; allowed: 1 or more"),
    ],
)
def test_bad_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        replace(QUICK, **changes)
    assert str(caught.value) == message


def test_bad_models_and_parts() -> None:
    with pytest.raises(ValueError, match=r"layer_sparsity 'rmi' needs 3 or more blocks, and the model has 2"):
        losa.run(model(2), ids(), parts(3), QUICK)
    with pytest.raises(ValueError, match=r"block 0, q has 8 inputs; allowed: a multiple of 5"):
        losa.run(model(), ids(), parts(3), replace(QUICK, sparsity_type="2:5"))
    with pytest.raises(ValueError, match=r"parts has 2 parts of \[4, 4\] examples; give 3 parts, none empty"):
        losa.run(model(), ids(), parts(2), QUICK)


@pytest.mark.parametrize(
    "name",
    ["embedding", "norm", "head", "block 1, attention_norm", "block 1, mlp_norm", "block 1, up", "block 1, bias of q"],
)
def test_what_is_not_finite_is_refused_wherever_it_is(name: str) -> None:
    broken = random_llama(SIZES, 4, tied=False, seed=0, biased=True)
    block = broken.blocks[1]
    parts_of_it = {f"block 1, {key}": value for key, value in (vars(block) | block.weights).items()}
    parts_of_it |= {"block 1, bias of q": block.biases["q"]} | vars(broken)
    parts_of_it[name].flat[-1] = -np.inf
    with pytest.raises(ValueError, match=rf"^{name} holds NaN or infinity"):
        losa.run(broken, ids(), parts(3), QUICK)
