"""Budgets against brute force, and fast at thousands of layers."""

import itertools
import os
import time

import numpy as np
import pytest

from spi_utils import plan
from spi_utils.errors import PlanError
from spi_utils.plan import GAP, in_order, least_cost


def brute_force(cost, size, limit, allowed):
    """Least cost over every combination."""
    items, formats = cost.shape
    best = np.inf
    for choice in itertools.product(range(formats), repeat=items):
        rows = np.arange(items)
        if allowed[rows, choice].all() and size[rows, choice].sum() <= limit:
            best = min(best, cost[rows, choice].sum())
    return best


def solved(cost, size, limit, allowed):
    return least_cost(cost, size, limit, allowed)


@pytest.mark.parametrize("seed", range(60))
def test_small_cases_are_the_optimum(seed):
    rng = np.random.default_rng(seed)
    items, formats = rng.integers(1, 8), rng.integers(2, 4)
    size = rng.integers(0, 30, (items, formats)).astype(float)
    cost = rng.random((items, formats))
    allowed = rng.random((items, formats)) < 0.85
    allowed[:, 0] = True
    least = np.where(allowed, size, np.inf).min(axis=1).sum()
    limit = least + rng.random() * 50
    choice, gap = solved(cost, size, limit, allowed)
    rows = np.arange(items)
    assert allowed[rows, choice].all() and size[rows, choice].sum() <= limit
    best = brute_force(cost, size, limit, allowed)
    start = cost[rows, np.where(allowed, size, np.inf).argmin(axis=1)].sum()
    assert cost[rows, choice].sum() <= best + GAP * max(start - best, 0) + 1e-12
    # What it says of itself holds: the optimum is no farther away than the gap.
    assert cost[rows, choice].sum() - best <= gap * (start - cost[rows, choice].sum()) + 1e-9


def test_a_greedy_trap_is_solved():
    # Per byte the first item is best (6/5), but it leaves room for nothing; the other two together save 10.
    cost = np.array([[6.0, 0.0], [5.0, 0.0], [5.0, 0.0]])
    size = np.array([[0.0, 5.0], [0.0, 5.0], [0.0, 5.0]]) - np.array([[0, 0], [0, 0.5], [0, 0.5]])
    assert solved(cost, size, 9.0, np.ones((3, 2), bool))[0].tolist() == [0, 1, 1]


@pytest.mark.parametrize("case", ["impossible", "floor", "everything", "nothing to choose"])
def test_ends_of_the_range(case):
    cost, size = np.array([[2.0, 1.0], [3.0, 0.0]]), np.array([[1.0, 4.0], [1.0, 4.0]])
    allowed = np.ones((2, 2), bool)
    if case == "impossible":
        with pytest.raises(PlanError, match="smallest possible choice takes 2"):
            least_cost(cost, size, 1.0, allowed)
    elif case == "floor":
        assert solved(cost, size, 2.0, allowed)[0].tolist() == [0, 0]
    elif case == "everything":
        assert solved(cost, size, 8.0, allowed)[0].tolist() == [1, 1]
    else:
        assert solved(np.zeros((0, 2)), np.zeros((0, 2)), 0.0, np.zeros((0, 2), bool))[0].shape == (0,)


def test_in_order_skips_what_does_not_fit_and_goes_on():
    taken = in_order(np.array([5, 4, 3, 2]), np.array([0, 1, 2, 3]), 10)
    assert taken.tolist() == [True, True, False, False]  # 5 + 4, then neither 3 nor 2 fits into 1
    assert in_order(np.array([5, 6, 3, 2]), np.array([0, 1, 2, 3]), 10).tolist() == [True, False, True, True]


def test_the_solver_runs_with_the_process_output_in_place(monkeypatch):
    """Redirected around it, what other threads print goes astray, and for good where two calls cross."""
    outputs, solve = [], plan.milp

    def looked(*args, **kwargs):
        outputs.append(os.fstat(1).st_ino)
        return solve(*args, **kwargs)

    monkeypatch.setattr(plan, "milp", looked)
    rng, before = np.random.default_rng(0), os.fstat(1).st_ino
    while len(outputs) < 5:
        cost, size = rng.random((12, 4)), rng.integers(1, 100, (12, 4)).astype(float)
        limit = 0.5 * (size.min(axis=1).sum() + size.max(axis=1).sum()) * rng.uniform(0.5, 1)
        least_cost(cost, size, max(limit, size.min(axis=1).sum()), np.ones(cost.shape, bool))
    assert set(outputs) == {before}


@pytest.mark.slow
@pytest.mark.parametrize(("formats", "seconds"), [(2, 1.0), (7, 3.0)])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_two_thousand_layers_are_fast_and_near_the_linear_bound(formats, seconds, share):
    rng = np.random.default_rng(0)
    bits = {2: [4.5, 16], 7: [4.127, 4.25, 4.5, 5, 6, 8.06, 16]}[formats]
    numel = rng.choice([2560 * 2560, 9216 * 2560, 1024 * 2560, 32 * 2560, 8192 * 2560], 2000)
    size = np.round(numel[:, None] * np.array(bits) / 8)
    cost = np.exp(rng.normal(0, 1, 2000))[:, None] * 4.0 ** -np.array(bits) * numel[:, None] ** 0.5
    limit = size.min(axis=1).sum() + share * (size.max(axis=1) - size.min(axis=1)).sum()
    started = time.process_time()  # the machine's other work is not this one's
    choice, gap = solved(cost, size, limit, np.ones(cost.shape, bool))
    assert time.process_time() - started < seconds
    rows = np.arange(2000)
    assert size[rows, choice].sum() <= limit
    # Any price gives a lower bound on every choice; the best of a fine grid is the linear optimum's value.
    prices = cost.max() / size.min() * np.logspace(-12, 0, 4001)
    bound = max((cost + price * size).min(axis=1).sum() - price * limit for price in prices)
    saved = cost[rows, size.argmin(axis=1)].sum() - cost[rows, choice].sum()
    assert cost[rows, choice].sum() - bound <= 1e-3 * saved
    assert gap <= GAP * (1 + 1e-9)
