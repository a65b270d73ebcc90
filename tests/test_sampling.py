"""The law of the Poisson draws and of the microbatch labels."""

import numpy as np
import pytest
from checks import check_binomial, check_independent_labels, check_poisson_batches
from plans import one_step_plan

from hf_dpclip.privacy import PoissonSampler, Randomness


DRAWS = 6000


def sampler(num_examples=60, expected_batch_size=12, num_microbatches=3, seed=None):
    plan = one_step_plan(
        num_examples=num_examples,
        expected_batch_size=expected_batch_size,
        num_microbatches=num_microbatches,
        accountant="rdp",  # for any number of examples
    )
    return PoissonSampler(plan, Randomness(seed).sampling())


@pytest.mark.parametrize("num_microbatches", [1, 3, 12])
def test_every_unit_joins_independently(num_microbatches):
    poisson = sampler(num_microbatches=num_microbatches)
    check_poisson_batches([poisson.draw() for _ in range(DRAWS)], 60, 0.2)


@pytest.mark.parametrize("num_microbatches", [2, 3])
def test_labels_are_uniform_and_independent(num_microbatches):
    poisson = sampler(num_microbatches=num_microbatches)
    check_independent_labels([poisson.draw() for _ in range(DRAWS)], 60, 0.2)


def test_successive_draws_are_independent():
    poisson = sampler()
    drawn = [0 in np.concatenate(poisson.draw()) for _ in range(DRAWS)]
    check_binomial([a and b for a, b in zip(drawn[::2], drawn[1::2])], 1, 0.04)


def test_no_unit_is_drawn_twice_in_one_step():
    units = np.concatenate(sampler(num_examples=1000, expected_batch_size=500).draw())
    assert len(set(units.tolist())) == len(units)


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_the_order_of_units_tells_nothing_of_the_others(num_microbatches):
    """That of the draw would: numpy puts a high number in an early place only if there are still higher ones, so that
    a loss which looks at the order could tell that there is one more unit, without its being drawn."""
    poisson = sampler(num_microbatches=num_microbatches)
    microbatches = [units for _ in range(100) for units in poisson.draw()]
    assert all((np.diff(units) > 0).all() for units in microbatches)


def test_units_are_microbatches_of_their_own_when_planned_so():
    microbatches = sampler(num_microbatches=12).draw()
    assert {len(microbatch) for microbatch in microbatches} == {1}


def test_a_whole_dataset_batch_contains_everyone():
    microbatches = sampler(expected_batch_size=60).draw()
    assert sorted(np.concatenate(microbatches).tolist()) == list(range(60))


def test_memory_and_time_do_not_depend_on_the_dataset():
    """A billion units could not be permuted here at all."""
    units = np.concatenate(sampler(num_examples=10**9, expected_batch_size=1000).draw())
    assert 800 < len(units) < 1200
    assert units.max() > 10**8


def test_processes_with_the_same_stream_draw_the_same():
    first, second = (sampler(seed=7) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first.draw(), second.draw()))


def test_every_microbatch_has_a_seed_of_its_own_out_of_all_that_32_bits_hold():
    """Equal ones would give all microbatches the same dropout. 50 of them agree somewhere once in 3 million times."""
    poisson = sampler()
    seeds = poisson.draw_seeds(20) + poisson.draw_seeds(30)
    assert len(set(seeds)) == 50
    assert 2**31 <= max(seeds) < 2**32
