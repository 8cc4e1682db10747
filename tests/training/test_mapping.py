"""Layer mappings: total, in range, and the least sum of distances."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_prune.training.mapping import closest_pairs, last_pair, ordered_pairs, uniform_pairs

DEPTHS = st.tuples(st.integers(1, 12), st.integers(1, 12)).map(lambda pair: tuple(sorted(pair)))


def test_by_hand():
    assert uniform_pairs(3, 6) == ((0, 1), (1, 3), (2, 5))
    assert uniform_pairs(4, 6) == ((0, 1), (1, 2), (2, 4), (3, 5))
    assert last_pair(3, 6) == ((2, 5),)
    distances = torch.tensor([[3.0, 1.0, 2.0], [1.0, 5.0, 4.0]])
    assert closest_pairs(distances) == ((0, 1), (1, 0))
    assert ordered_pairs(distances) == ((0, 0), (1, 0))


@given(depths=DEPTHS)
def test_uniform_is_in_order_and_ends_with_the_last(depths):
    student, teacher = depths
    pairs = uniform_pairs(student, teacher)
    assert [i for i, _ in pairs] == list(range(student))
    theirs = [j for _, j in pairs]
    assert theirs == sorted(set(theirs))
    assert theirs[-1] == teacher - 1


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_ordered_is_the_best_of_all_that_are_in_order(seed, rows, columns):
    distances = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    every = itertools.combinations_with_replacement(range(columns), rows)
    best = min(sum(float(distances[i, j]) for i, j in enumerate(choice)) for choice in every)
    pairs = ordered_pairs(distances)
    theirs = [j for _, j in pairs]
    assert theirs == sorted(theirs)
    assert abs(sum(float(distances[i, j]) for i, j in pairs) - best) < 1e-5
