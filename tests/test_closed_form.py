"""The closed-form solver against the textbook formula, and the properties that define it."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loco_core.editing import closed_form
from loco_core.editing.closed_form import LowRankMap, fit

claim = settings(deadline=None, max_examples=40, derandomize=True)

SEEDS = st.integers(0, 10_000)
ROWS = st.integers(1, 6)
KEPT = st.integers(0, 4)
WIDTHS = st.integers(12, 24)
LAMS = st.sampled_from([1e-4, 0.01, 1.0, 30.0])


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def textbook(W, keys, targets, lam, weights=None, preserve=None):
    """W' = W (sum s g c^T + lam I)(sum s c c^T + lam I)^-1, row by row, with the d x d inverse."""
    pairs = list(zip(keys, targets, strict=True))
    pairs += [(kept, kept) for kept in (preserve if preserve is not None else [])]
    weights = torch.ones(len(pairs)) if weights is None else weights
    left = lam * torch.eye(W.shape[1], dtype=torch.float64)
    right = left.clone()
    for s, (c, g) in zip(weights, pairs, strict=True):
        left += s * torch.outer(g, c)
        right += s * torch.outer(c, c)
    return W @ left @ torch.linalg.inv(right)


def distance(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


@claim
@given(SEEDS, ROWS, KEPT, WIDTHS, LAMS)
def test_fit_agrees_with_the_textbook_normal_equations(seed, n, p, d, lam):
    keys, targets, W = draw(seed, n, d), draw(seed + 1, n, d), draw(seed + 2, 9, d)
    kept, weights = draw(seed + 3, p, d), draw(seed + 4, n + p).abs() + 0.1
    found = fit(keys, targets, lam, weights=weights, preserve=kept)
    expected = textbook(W, keys, targets, lam, weights, kept)
    assert distance(found.apply_to(W), expected) < 1e-8
    assert distance(W + found.delta(W), expected) < 1e-8


@claim
@given(SEEDS, ROWS, st.integers(2, 4), LAMS)
def test_fit_agrees_with_the_textbook_when_rows_outnumber_columns(seed, n, d, lam):
    keys, targets, W = draw(seed, n + d, d), draw(seed + 1, n + d, d), draw(seed + 2, 3, d)
    assert distance(fit(keys, targets, lam).apply_to(W), textbook(W, keys, targets, lam)) < 1e-8


@claim
@given(SEEDS, ROWS, WIDTHS, LAMS)
def test_edited_weight_is_where_the_objective_has_no_slope(seed, n, d, lam):
    keys, targets = draw(seed, n, d), draw(seed + 1, n, d)
    W = draw(seed + 2, 5, d)
    edited = fit(keys, targets, lam).apply_to(W).requires_grad_()
    loss = (keys @ edited.T - targets @ W.T).square().sum() + lam * (edited - W).square().sum()
    loss.backward()
    assert edited.grad.norm() < 1e-9 * (1 + W.norm() * keys.norm() * targets.norm())


@claim
@given(SEEDS, ROWS, KEPT, WIDTHS, LAMS)
def test_targets_equal_to_keys_give_the_identity(seed, n, p, d, lam):
    keys, W = draw(seed, n, d), draw(seed + 1, 7, d)
    same = fit(keys, keys, lam, preserve=draw(seed + 2, p, d))
    assert same.rank == 0
    assert torch.equal(same.apply_to(W), W)


@claim
@given(SEEDS, ROWS, WIDTHS)
def test_large_lam_gives_the_original(seed, n, d):
    keys, targets, W = draw(seed, n, d), draw(seed + 1, n, d), draw(seed + 2, 7, d)
    changes = [distance(fit(keys, targets, lam).apply_to(W), W) for lam in (1e3, 1e6, 1e12)]
    assert changes[0] > changes[1] > changes[2]
    assert changes[2] < 1e-9


@claim
@given(SEEDS, ROWS, KEPT, WIDTHS)
def test_lam_zero_interpolates_exactly_and_small_lam_approaches_it(seed, n, p, d):
    keys, targets, W = draw(seed, n, d), draw(seed + 1, n, d), draw(seed + 2, 7, d)
    kept = draw(seed + 3, p, d)
    missed = [
        distance(fit(keys, targets, lam, preserve=kept).apply_to(W) @ keys.T, W @ targets.T)
        for lam in (1e-2, 1e-5, 1e-9, 0.0)
    ]
    assert missed == sorted(missed, reverse=True) or missed[2] < 1e-6
    assert missed[3] < 1e-8
    held = fit(keys, targets, 0.0, preserve=kept).apply_to(W)
    assert (held @ kept.T - W @ kept.T).norm() <= 1e-8 * (W.norm() * (1 + kept.norm()))


@claim
@given(SEEDS, ROWS, WIDTHS)
def test_lam_zero_makes_the_smallest_change_that_interpolates(seed, n, d):
    keys, targets, W = draw(seed, n, d), draw(seed + 1, n, d), draw(seed + 2, 7, d)
    smallest = torch.linalg.lstsq(keys, (targets - keys) @ W.T).solution.T
    assert distance(fit(keys, targets, 0.0).delta(W), smallest) < 1e-7


@claim
@given(SEEDS, ROWS, KEPT, LAMS)
def test_edit_leaves_orthogonal_tokens_untouched(seed, n, p, lam):
    keys, kept = torch.zeros(n, 30).double(), torch.zeros(p, 30).double()
    keys[:, :20], kept[:, :20] = draw(seed, n, 20), draw(seed + 1, p, 20)
    elsewhere = torch.zeros(5, 30).double()
    elsewhere[:, 20:] = draw(seed + 2, 5, 10)
    W = draw(seed + 3, 7, 30)
    edited = fit(keys, draw(seed + 4, n, 30), lam, preserve=kept).apply_to(W)
    assert torch.equal(edited[:, 20:], W[:, 20:])
    assert torch.equal(edited @ elsewhere.T, W @ elsewhere.T)


@claim
@given(SEEDS, ROWS, KEPT, WIDTHS, LAMS)
def test_row_order_is_irrelevant(seed, n, p, d, lam):
    keys, targets, W = draw(seed, n, d), draw(seed + 1, n, d), draw(seed + 2, 7, d)
    kept, weights = draw(seed + 3, p, d), draw(seed + 4, n).abs() + 0.1
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    once = fit(keys, targets, lam, weights, kept)
    again = fit(keys[order], targets[order], lam, weights[order], kept.flip(0))
    assert distance(again.apply_to(W), once.apply_to(W)) < 1e-9


@claim
@given(SEEDS, ROWS, KEPT, WIDTHS, st.one_of(LAMS, st.just(0.0)))
def test_rank_is_at_most_the_number_of_edited_rows(seed, n, p, d, lam):
    found = fit(draw(seed, n, d), draw(seed + 1, n, d), lam, preserve=draw(seed + 2, p, d))
    W = draw(seed + 3, d + 5, d)
    assert found.D.shape == (d, n) and found.R.shape == (n, d)
    assert found.rank == torch.linalg.matrix_rank(found.delta(W), rtol=1e-9) == n


def test_rank_counts_coinciding_rows_once():
    keys, targets = draw(0, 2, 16), draw(1, 2, 16)
    found = fit(keys[[0, 1, 0]], targets[[0, 1, 0]], lam=0.01)
    assert found.rank == 2


@claim
@given(SEEDS, ROWS, WIDTHS, LAMS, st.lists(st.integers(1, 4), min_size=6, max_size=6))
def test_a_whole_weight_equals_repeating_the_row(seed, n, d, lam, times):
    keys, targets, W = draw(seed, n, d), draw(seed + 1, n, d), draw(seed + 2, 7, d)
    counts = torch.tensor(times[:n])
    weighted = fit(keys, targets, lam, weights=counts)
    repeated = fit(keys.repeat_interleave(counts, 0), targets.repeat_interleave(counts, 0), lam)
    assert distance(weighted.apply_to(W), repeated.apply_to(W)) < 1e-9


@claim
@given(SEEDS, ROWS, WIDTHS, LAMS)
def test_a_row_of_weight_zero_does_not_count(seed, n, d, lam):
    keys, targets, W = draw(seed, n + 1, d), draw(seed + 1, n + 1, d), draw(seed + 2, 7, d)
    weights = torch.ones(n + 1)
    weights[0] = 0
    assert (
        distance(
            fit(keys, targets, lam, weights).apply_to(W),
            fit(keys[1:], targets[1:], lam).apply_to(W),
        )
        < 1e-12
    )


@claim
@given(SEEDS, ROWS, WIDTHS, LAMS)
def test_preserved_rows_equal_edit_rows_that_are_their_own_target(seed, n, d, lam):
    keys, targets, kept = draw(seed, n, d), draw(seed + 1, n, d), draw(seed + 2, 3, d)
    W = draw(seed + 3, 7, d)
    as_rows = fit(torch.cat([keys, kept]), torch.cat([targets, kept]), lam)
    assert distance(fit(keys, targets, lam, preserve=kept).apply_to(W), as_rows.apply_to(W)) < 1e-10


@claim
@given(SEEDS, st.sampled_from([1e-6, 1e-5, 1e-4, 1e-3]))
def test_nearly_coinciding_keys_keep_five_digits(seed, apart):
    # CLIP-like rows: a large common part, small differences. float32 d x d inverses fail here.
    common, n, d = 30 * draw(seed, 1, 32), 4, 32
    keys = common + apart * draw(seed + 1, n, d)
    targets, W = common + draw(seed + 2, n, d), draw(seed + 3, 8, d)
    lam = 1e-6
    A = torch.cat([keys, lam**0.5 * torch.eye(d, dtype=torch.float64)])
    b = torch.cat([(targets - keys) @ W.T, torch.zeros(d, 8, dtype=torch.float64)])
    by_least_squares = torch.linalg.lstsq(
        A, b
    ).solution.T  # QR of the stacked system, no Gram matrix
    assert distance(fit(keys, targets, lam).delta(W), by_least_squares) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_edited_weight_keeps_dtype_and_is_rounded_once(dtype):
    keys, targets, W = draw(0, 3, 16), draw(1, 3, 16), draw(2, 7, 16).to(dtype)
    before = W.clone()
    edited = fit(keys, targets, 0.01).apply_to(W)
    assert edited.dtype == dtype
    assert torch.equal(edited, textbook(W.double(), keys, targets, 0.01).to(dtype))
    assert torch.equal(W, before)


def test_dependent_keys_that_agree_are_interpolated_at_lam_zero():
    keys, targets, W = draw(0, 2, 16), draw(1, 2, 16), draw(2, 7, 16)
    keys = torch.cat([keys, keys[:1] + 2 * keys[1:]])
    targets = torch.cat([targets, targets[:1] + 2 * targets[1:]])
    edited = fit(keys, targets, 0.0).apply_to(W)
    assert distance(edited @ keys.T, W @ targets.T) < 1e-10


KEYS, TARGETS = draw(0, 3, 8), draw(1, 3, 8)
BAD = {
    "negative lam": (dict(lam=-0.5), "lam must be a finite number >= 0, not -0.5"),
    "NaN lam": (dict(lam=float("nan")), "lam must be a finite number"),
    "infinite lam": (dict(lam=float("inf")), "lam must be a finite number"),
    "lam as text": (dict(lam="0.01"), "lam must be a finite number"),
    "NaN in keys": (
        dict(keys=KEYS.clone().index_fill_(0, torch.tensor([1]), torch.nan)),
        "rows \\[1\\]",
    ),
    "infinite target": (dict(targets=TARGETS / 0), "targets holds NaN or infinite"),
    "no rows": (dict(keys=KEYS[:0], targets=TARGETS[:0]), "keys is empty"),
    "a vector": (dict(keys=KEYS[0]), "keys must be a matrix"),
    "unpaired rows": (dict(targets=TARGETS[:2]), "\\[3, 8\\] and targets is \\[2, 8\\]"),
    "width of preserve": (dict(preserve=draw(2, 2, 7)), "keys' width 8"),
    "number of weights": (dict(weights=torch.ones(2)), "shape \\[3\\], not \\[2\\]"),
    "negative weight": (dict(weights=torch.tensor([1.0, -1.0, 1.0])), ">= 0"),
    "contradiction at lam=0": (
        dict(keys=KEYS[[0, 1, 1]], lam=0),
        "linear combination of other rows .* use lam > 0",
    ),
    "edited and preserved at lam=0": (dict(lam=0, preserve=KEYS[:1]), "linear combination"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_the_reason(change, message):
    with pytest.raises(ValueError, match=message):
        fit(**{"keys": KEYS, "targets": TARGETS, "lam": 0.01} | change)


def test_map_refuses_a_weight_of_another_width():
    with pytest.raises(ValueError, match=r"\[out, 8\], not \[4, 9\]"):
        fit(KEYS, TARGETS, 0.01).apply_to(torch.ones(4, 9))


def test_map_refuses_factors_that_do_not_fit_or_are_not_finite():
    with pytest.raises(ValueError, match="must agree"):
        LowRankMap(draw(0, 8, 3), draw(1, 2, 8))
    with pytest.raises(ValueError, match="R holds NaN"):
        LowRankMap(draw(0, 8, 3), draw(1, 3, 8) * torch.nan)
    with pytest.raises(ValueError, match="D must be a float64 matrix"):
        LowRankMap(draw(0, 8, 3).float(), draw(1, 3, 8))


def test_maps_are_equal_when_their_factors_are():
    one, same, other = fit(KEYS, TARGETS, 0.01), fit(KEYS, TARGETS, 0.01), fit(KEYS, TARGETS, 0.02)
    assert one == same and hash(one) == hash(same)
    assert one != other


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(closed_form).failed == 0
