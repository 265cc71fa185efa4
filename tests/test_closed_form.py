"""The closed-form solver against the textbook formula, and the properties that define it."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loco_core.closed_form import solver as closed_form
from loco_core.closed_form.solver import fit, fit_moments
from loco_core.edits.low_rank import LowRankMap

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


def projected(W, keys, targets, lam, held, weights=None, preserve=None):
    """Equation (3) the slow way: W' = W + X with X = X P, P = I - pinv(held) held, d x d."""
    P = torch.eye(W.shape[1], dtype=torch.float64) - torch.linalg.pinv(held) @ held
    rows = keys if preserve is None else torch.cat([keys, preserve])
    moves = torch.zeros_like(rows)
    moves[: len(keys)] = targets - keys
    S = torch.eye(len(rows), dtype=torch.float64) if weights is None else weights.double().diag()
    free = rows @ P
    right = lam * torch.eye(W.shape[1], dtype=torch.float64) + free.T @ S @ free
    return W + W @ moves.T @ S @ free @ torch.linalg.inv(right)


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
    without = fit(keys[1:], targets[1:], lam)
    assert distance(fit(keys, targets, lam, weights).apply_to(W), without.apply_to(W)) < 1e-12


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
    by_least_squares = torch.linalg.lstsq(A, b).solution.T  # of the stacked system, no Gram matrix
    assert distance(fit(keys, targets, lam).delta(W), by_least_squares) < 1e-5


@claim
@given(SEEDS, ROWS, KEPT, LAMS, st.integers(1, 4))
def test_null_space_agrees_with_the_projected_normal_equations(seed, n, p, lam, r):
    d = 20
    keys, targets, W = draw(seed, n, d), draw(seed + 1, n, d), draw(seed + 2, 7, d)
    kept, weights, held = (
        draw(seed + 3, p, d),
        draw(seed + 4, n + p).abs() + 0.1,
        draw(seed + 5, r, d),
    )
    found = fit(keys, targets, lam, weights, kept, held)
    assert distance(found.apply_to(W), projected(W, keys, targets, lam, held, weights, kept)) < 1e-8
    assert found.rank <= n


@claim
@given(
    SEEDS,
    ROWS,
    st.integers(1, 4),
    st.sampled_from([0.0, 1e-9, 1e-4, 0.01, 1.0]),
    st.sampled_from([0.1, 1e-3, 1e-6]),
)
def test_rows_of_the_null_space_are_held_exactly_whatever_lam(seed, n, r, lam, apart):
    keys, targets, W = draw(seed, n, 20), draw(seed + 1, n, 20), draw(seed + 2, 7, 20)
    # Near a key, as the prompts to be spared are: little of the key is left to edit.
    held = draw(seed + 3, r, 20)
    held[0] = keys[0] + apart * held[0]
    edit = fit(keys, targets, lam, null_space=held)
    change = edit.delta(W)
    assert change.norm() > 0
    assert (change @ held.T).norm() <= 1e-12 * change.norm() * held.norm()
    if lam == 0 and apart == 0.1:
        assert distance(edit.apply_to(W) @ keys.T, W @ targets.T) < 1e-7


@claim
@given(SEEDS, ROWS, st.integers(2, 4), LAMS)
def test_repeated_rows_of_the_null_space_count_once(seed, n, r, lam):
    keys, targets, held = draw(seed, n, 20), draw(seed + 1, n, 20), draw(seed + 2, r, 20)
    W = draw(seed + 3, 7, 20)
    redundant = torch.cat([held, held.flip(0), 3 * held[:1] - held[1:2], torch.zeros_like(held)])
    once, again = (fit(keys, targets, lam, null_space=rows) for rows in (held, redundant))
    assert distance(again.apply_to(W), once.apply_to(W)) < 1e-9


@claim
@given(SEEDS, ROWS, LAMS)
def test_a_null_space_apart_from_the_keys_changes_nothing(seed, n, lam):
    keys, held = torch.zeros(n, 20).double(), torch.zeros(3, 20).double()
    keys[:, :14], held[:, 14:] = draw(seed, n, 14), draw(seed + 1, 3, 6)
    targets, W = draw(seed + 2, n, 20), draw(seed + 3, 7, 20)
    bound, free = fit(keys, targets, lam, null_space=held), fit(keys, targets, lam)
    assert distance(bound.apply_to(W), free.apply_to(W)) < 1e-12


@pytest.mark.parametrize("held", ["the keys themselves", "combinations of them", "everything"])
def test_a_null_space_that_holds_every_key_is_refused(held):
    keys, targets = draw(0, 3, 8), draw(1, 3, 8)
    rows = {"the keys themselves": keys, "combinations of them": draw(2, 5, 3) @ keys}.get(held)
    rows = draw(3, 12, 8) if rows is None else rows
    known = 8 if held == "everything" else 3
    with pytest.raises(ValueError, match=f"holds {known} of 8 directions, every key .* preserve"):
        fit(keys, targets, 0.01, null_space=rows)
    fit(torch.cat([keys, draw(4, 1, 8)]), draw(5, 4, 8), 0.01, null_space=keys)  # one key is free


def test_a_hundred_edits_beside_nine_hundred_preserved_rows_agree_with_the_textbook():
    d, lam = 320, 0.01
    common = 4 * draw(0, 1, d)
    keys, targets, kept = (common + draw(seed, k, d) for seed, k in ((1, 100), (2, 100), (3, 900)))
    W = draw(4, 16, d)
    C, G = torch.cat([keys, kept]), torch.cat([targets, kept])
    right = lam * torch.eye(d, dtype=torch.float64) + C.T @ C
    change = torch.linalg.solve(right, W @ (G - C).T @ C, left=False)
    found = fit(keys, targets, lam, preserve=kept)
    assert distance(found.delta(W), change) < 1e-8
    assert found.D.shape == (d, 100)


def some_map(seed, n, d):
    return fit(draw(seed, n, d), draw(seed + 1, n, d), 0.01)


@claim
@given(SEEDS, ROWS, WIDTHS, st.floats(-3, 3))
def test_scaling_is_linear_from_the_identity_to_the_edit_and_beyond(seed, n, d, scale):
    change, W = some_map(seed, n, d), draw(seed + 2, 7, d)
    assert torch.equal(change.scaled(0).apply_to(W), W) and change.scaled(0).rank == 0
    assert change.scaled(1) == change
    assert (change.scaled(scale).delta(W) - scale * change.delta(W)).norm() < 1e-12 * (
        change.delta(W).norm()
    )
    assert distance(change.scaled(2).scaled(0.5).delta(W), change.delta(W)) < 1e-12


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "half", None])
def test_a_scale_that_is_no_finite_number_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be a finite number, not"):
        some_map(0, 2, 8).scaled(scale)


@claim
@given(SEEDS, ROWS, ROWS, st.integers(1, 3), WIDTHS)
def test_then_equals_editing_twice(seed, n, m, k, d):
    first, second, third = some_map(seed, n, d), some_map(seed + 2, m, d), some_map(seed + 4, k, d)
    W = draw(seed + 6, 7, d)
    twice = second.apply_to(first.apply_to(W))
    assert distance(first.then(second).apply_to(W), twice) < 1e-10
    assert first.then(second).D.shape == (d, n + m)
    left, right = first.then(second).then(third), first.then(second.then(third))
    assert distance(left.apply_to(W), right.apply_to(W)) < 1e-9


def test_maps_of_two_widths_do_not_follow_one_another():
    with pytest.raises(ValueError, match="width 8 cannot be followed by one of width 9"):
        some_map(0, 2, 8).then(some_map(0, 2, 9))


@claim
@given(SEEDS, st.integers(1, 30), st.integers(12, 24))
def test_relative_change_equals_the_dense_formula(seed, n, d):
    change, W = some_map(seed, n, d), draw(seed + 2, 7, d)
    dense = W @ (torch.eye(d, dtype=torch.float64) + change.D @ change.R) - W
    assert change.relative_change(W) == pytest.approx(float(dense.norm() / W.norm()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_edited_half_precision_weight_keeps_its_dtype_and_is_rounded_once(dtype):
    keys, targets, W = draw(0, 3, 16), draw(1, 3, 16), draw(2, 7, 16).to(dtype)
    before = W.clone()
    edited = fit(keys, targets, 0.01).apply_to(W)
    assert edited.dtype == dtype
    assert torch.equal(edited, textbook(W.double(), keys, targets, 0.01).to(dtype))
    assert torch.equal(W, before)


def misses(change: LowRankMap, W: torch.Tensor, edited: torch.Tensor) -> float:
    """How far the change of a weight is off, beyond the rounding of the weight itself, relative."""
    W, edited = W.double(), edited.double()
    exact = W + W @ change.D @ change.R
    spacing = torch.finfo(torch.float32).eps * exact.abs()
    return float(((edited - exact).abs() - spacing).clamp(min=0).norm() / change.delta(W).norm())


@claim
@given(SEEDS, ROWS, st.sampled_from([1.0, 1e-1, 1e-2, 1e-3]), LAMS)
def test_float32_weight_is_edited_to_a_part_in_a_million_though_keys_nearly_coincide(
    seed, n, apart, lam
):
    d = 48
    # One target for keys that nearly coincide: rows of R are long and all but cancel in D R.
    keys, targets = draw(seed, 1, d) + apart * draw(seed + 1, n, d), draw(seed + 2, 1, d)
    targets, W = targets.expand(n, d), draw(seed + 3, 64, d).float()
    change, before = fit(keys, targets, lam), W.clone()
    edited = change.apply_to(W)
    assert edited.dtype == torch.float32 and torch.equal(W, before)
    assert misses(change, W, edited) < 1e-6


@pytest.fixture(params=["autocast", "bfloat16 matmuls"])
def short_products(request):
    """A user's setting that makes float32 products lose digits."""
    if request.param == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield
    else:
        torch.set_float32_matmul_precision("medium")
        yield
        torch.set_float32_matmul_precision("highest")


def test_settings_that_shorten_float32_products_do_not_reach_an_edit(short_products):
    W, change = draw(0, 64, 64).float(), some_map(1, 3, 64)
    edited = change.apply_to(W)
    assert edited.dtype == torch.float32
    assert distance(edited.double() - W.double(), change.delta(W)) < 2e-6  # bfloat16: 4e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_edited_weight_can_be_written_where_asked_and_in_place(dtype):
    W, change = draw(0, 300, 16).to(dtype), some_map(1, 3, 16)
    expected, elsewhere = change.apply_to(W), torch.zeros_like(W)
    assert change.apply_to(W, out=elsewhere) is elsewhere and torch.equal(elsewhere, expected)
    assert change.apply_to(W, out=W) is W and torch.equal(W, expected)
    with pytest.raises(ValueError, match=r"out must be \[300, 16\], not \[16, 300\]"):
        change.apply_to(W, out=W.T)


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
    "width of the null space": (dict(null_space=draw(2, 2, 9)), "null_space must have .* width 8"),
    "NaN in the null space": (dict(null_space=KEYS / 0), "null_space holds NaN"),
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


# --- by moments


@pytest.mark.parametrize("lam, weigh", [(0.01, None), (3.0, (2.0, 0.5)), (1e-9, None), (0.0, None)])
@pytest.mark.parametrize("hold", [False, True])
def test_more_rows_than_features_give_the_map_of_the_gram_matrix(lam, weigh, hold):
    """Equation (4) against (2), whose inverse is written out in the singular values of the rows."""
    n, p, d = 5, 300, 24
    C, G, K = draw(0, n, d), draw(1, n, d), draw(2, p, d) + 3 * draw(3, 1, d)
    if lam == 0:
        G = C.clone()  # 305 rows of 24 features are met exactly only where nothing is asked
    held = draw(4, 2, d) if hold else None
    s = torch.ones(n + p).double()
    if weigh:
        s[:n], s[n:] = weigh
    every = torch.cat([C, K]).double()
    if hold:
        Q = torch.linalg.qr(held.double().T)[0]
        every = every - every @ Q @ Q.T
    root = s.sqrt()[:, None]
    U, sigma, Vh = torch.linalg.svd(root * every, full_matrices=False)
    gain = torch.where(sigma > 1e-9, sigma / (sigma.square() + lam), 0.0)
    R = (root * (U * gain @ Vh))[:n]
    found = fit(C, G, lam, weights=s, preserve=K, null_space=held)
    assert found.R.shape == (n, d) and found.D.shape == (d, n)
    assert (found.R - R).norm() < 1e-9 * R.norm()


def test_sums_over_rows_are_enough():
    n, p, d = 40, 500, 16
    C, G, K = draw(0, n, d).double(), draw(1, n, d).double(), draw(2, p, d).double()
    moment = C.T @ C + K.T @ K
    summed = fit_moments(moment, (G - C).T @ C, 0.3)
    W = draw(5, 4, d).double()
    exact = W + W @ (G - C).T @ C @ torch.linalg.inv(0.3 * torch.eye(d).double() + moment)
    assert torch.allclose(summed.apply_to(W), exact, atol=1e-9)
    assert torch.allclose(fit(C, G, 0.3, preserve=K).apply_to(W), exact, atol=1e-9)
    few = fit_moments(moment, (G - C)[:3].T @ C[:3], 0.3)
    assert few.rank == few.D.shape[1] == 3
    nothing = fit_moments(moment, torch.zeros(d, d), 0.3)
    assert torch.equal(nothing.apply_to(W), W)


@pytest.mark.parametrize(
    "moment, change, lam, message",
    [
        (torch.eye(3), torch.eye(3), 0.0, "lam must be a finite number > 0"),
        (torch.eye(3), torch.eye(4), 1.0, "must be d x d alike"),
        (-torch.eye(3), torch.eye(3), 1.0, "negative eigenvalue"),
        (torch.eye(3) * torch.nan, torch.eye(3), 1.0, "moment holds NaN"),
    ],
)
def test_sums_that_are_none_are_refused(moment, change, lam, message):
    with pytest.raises(ValueError, match=message):
        fit_moments(moment, change, lam)


def test_maps_are_equal_when_their_factors_are():
    one, same, other = fit(KEYS, TARGETS, 0.01), fit(KEYS, TARGETS, 0.01), fit(KEYS, TARGETS, 0.02)
    assert one == same and hash(one) == hash(same)
    assert one != other


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(closed_form).failed == 0
