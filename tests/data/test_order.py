"""The order of the training data: permutations, no gaps, no state."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.data.order import step_indices


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 1000))
def test_every_epoch_is_a_permutation_read_without_gaps(total, batch_size, seed):
    stream = [
        i
        for step in range(3 * total)
        for i in step_indices(total, batch_size, step, seed)
    ]
    epochs = [stream[i : i + total] for i in range(0, 3 * total, total)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)


def test_a_batch_that_crosses_the_end_of_an_epoch():
    first, second = step_indices(10, 7, 0, 0), step_indices(10, 7, 1, 0)
    assert (
        len(second) == 7
        and sorted(first + second[:3]) == list(range(10))
        and len(set(second[3:])) == 4
    )


def test_a_pure_function_of_seed_and_step():
    wanted = step_indices(50, 8, 17, 3)
    wanted_copy = list(wanted)
    wanted.clear()  # a caller's own list, not the cached permutation
    for step in (400, 2, 90, 1000):
        step_indices(50, 8, step, 3)
    assert step_indices(50, 8, 17, 3) == wanted_copy


def test_epochs_and_seeds_shuffle_differently():
    orders = [
        tuple(step_indices(30, 30, epoch, seed))
        for epoch in range(3)
        for seed in range(3)
    ]
    assert len(set(orders)) == 9
