"""Two ranks do what one does: gradients, trainings, samples and states, with replicated and
with sharded weights.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from two_ranks import EXAMPLES, KINDS, LAYOUTS, STORES, do_everything, go_on, run_two

from nanomath.models.batches import Example, micro_batches
from nanomath.training import ranks

EXAMPLES_OF_SOME_PROMPTS = st.lists(
    st.builds(
        Example,
        st.sampled_from([[1], [2, 2], [3] * 9, [4] * 20]),
        st.lists(st.just(0), max_size=20),
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one(directory):
    """What a single process does; the two go on from what it saved."""
    return do_everything(directory)


@pytest.fixture(scope="module")
def two(directory, one):
    return run_two(directory)


@pytest.fixture(scope="module")
def both(two):
    return [done["everything"] for done in two]


def assert_close(found, expected, tolerance: float) -> None:
    """Numbers, relative to 1 or to the largest, in lists and dicts of them."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name], tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, tolerance)
    elif isinstance(expected, torch.Tensor):
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)
    else:
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


# --- one process, or pretending to be several ------------------------------------------------


def test_without_torchrun_everything_is_the_identity(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert ranks.start(torch.device("cpu")) == torch.device("cpu")
    assert (ranks.count(), ranks.number(), ranks.is_main()) == (1, 0, True)
    assert [ranks.any_rank(flag) for flag in (True, False)] == [True, False]
    assert (
        ranks.gather(ranks.share([3, 1, 2])) == [3, 1, 2]
        and ranks.from_main("x") == "x"
    )
    tensor = torch.ones(2)
    ranks.sum_([tensor])
    ranks.finish()
    assert torch.equal(tensor, torch.ones(2)) and ranks.lost(RuntimeError("gloo")) == ""


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ValueError, match="rank 1 of this machine finds 1 GPU.*--nproc_per_node"
    ):
        ranks.start(torch.device("cuda"))


@given(EXAMPLES_OF_SOME_PROMPTS, st.integers(1, 5), st.integers(0, 60), st.booleans())
@settings(deadline=None, max_examples=100)
def test_micro_batches_of_all_ranks(examples, count, budget, equal):
    cuts = []
    for number in range(count):
        as_one_of_them = {
            "count": lambda: count,
            "number": lambda number=number: number,
        }
        with patch.multiple(ranks, is_sharded=lambda model: equal, **as_one_of_them):
            cut = ranks.micro_batches_of(torch.nn.Identity(), examples, budget)
            cuts.append([(micro.tolist(), counts) for micro, counts in cut])
    counted = [[micro for micro, counts in cut if counts] for cut in cuts]
    everything = sorted(i for cut in counted for micro in cut for i in micro)
    assert everything == list(range(len(examples)))
    assert count > 1 or counted[0] == micro_batches(examples, budget)
    prompts = [
        {tuple(examples[i].prompt) for micro in cut for i in micro} for cut in counted
    ]
    if len(set().union(*prompts)) >= count:  # those of a prompt stay together
        assert sum(map(len, prompts)) == len(set().union(*prompts))
    else:
        assert min(map(len, counted)) > 0 or len(examples) < count
    padding = [micro for cut in cuts for micro, counts in cut if not counts]
    assert not equal or len({len(cut) for cut in cuts}) == 1
    shortest = min(map(len, examples), default=0)
    assert all(
        len(micro) == 1 and len(examples[micro[0]]) == shortest for micro in padding
    )
    assert equal or not padding


# --- two processes ---------------------------------------------------------------------------


def test_messages(one, both):
    for found in (one, *both):
        assert found["any"] == [False, True, True] and found["from main"] == {"rank": 0}
        assert found["gather"] == [list(range(size)) for size in range(6)]
        assert all(
            torch.equal(tensor, torch.full_like(tensor, 6)) for tensor in found["sum"]
        )


def test_what_is_sharded_is(one, both):
    assert not any(found["replicated"]["is sharded"] for found in (one, *both))
    assert [found["sharded"]["is sharded"] for found in (one, *both)] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_rank(one, both, kind, layout):
    expected = one[kind]["gradients"][layout]
    assert_close(both[0][kind]["gradients"][layout], expected, 1e-10)
    assert_close(
        both[1][kind]["gradients"][layout]["metrics"], expected["metrics"], 1e-10
    )
    assert len(expected["gradient"]) > 10 and all(
        float(g.abs().max()) > 0 for g in expected["gradient"].values()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_may_have_nothing_to_do(one, both, kind):
    assert_close(both[0][kind]["gradient of one"], one[kind]["gradient of one"], 1e-10)


def rounding(store: str) -> float:
    """How far apart trainings may be whose sums are taken in another order.

    bfloat16 may round the other way, of a gradient that is nearly 0 Adam makes a whole step, and
    every step goes on from there. Sums that are no sums show in float32.
    """
    return 2e-5 if store == "float32" else 3e-1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", STORES)
def test_trainings_are_those_of_one_rank(one, both, kind, store):
    expected, found = one[kind]["training"][store], both[0][kind]["training"][store]
    assert_close(found, expected, rounding(store))
    other = both[1][kind]["training"][store]
    assert (
        other["metrics"] == found["metrics"]
        and other["heldout"] == found["heldout"]
        and other["state"] == {}
    )
    assert all(
        torch.equal(other["weights"][name], weight)
        for name, weight in found["weights"].items()
    )
    assert found["metrics"][-1]["nll"] < found["metrics"][0]["nll"] - 1


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_one_rank(one, both, kind):
    samples = [found[kind]["samples"] for found in (one, *both)]
    assert samples[0] == samples[1] == samples[2]
    assert (
        len(
            {
                tuple(tokens)
                for prompt, _, tokens, *_ in samples[0][:14]
                if prompt in (1, 2, 4)
            }
        )
        == 6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_episodes_are_rewarded_once(one, both, kind):
    """By the rank that drew them: the same rewards everywhere, though the ranks do not judge
    alike.
    """
    expected, found = one[kind]["episodes"], both[0][kind]["episodes"]
    assert found == both[1][kind]["episodes"]
    assert [episode[:3] for episode in found] == [episode[:3] for episode in expected]
    assert [reward - 100 * (prompt % 2) for _, prompt, _, reward in found] == [
        reward for *_, reward in expected
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_number_on_one_rank_stops_all(one, both, kind):
    said = {found[kind]["bad number"] for found in (one, *both)}
    assert said == {f"the nll of example 4 of {len(EXAMPLES)} in the batch is nan"}


def test_states_of_one_rank_and_of_two_continue_each_other(directory, one, two):
    """Replicated and sharded in all combinations; that a loaded state is the saved one to the
    bit is asserted there.
    """
    for gone_on in (two[0]["gone on"], go_on(directory, others=2)):
        assert len(gone_on) == len(STORES) * len(KINDS) ** 2
        for (store, *_), found in gone_on.items():
            unbroken = one["replicated"]["training"][store]
            assert_close(
                found, {**unbroken, "metrics": unbroken["metrics"][2:]}, rounding(store)
            )


def test_a_death_is_told_in_one_line(two):
    line = "rank 0 of 2: another rank died and this one cannot go on; its own message says why"
    assert two[0]["death"] == [line, line, line, ""]
