"""The arithmetic of the federation benchmark; the runs themselves are too long for a test."""

import pytest

from hfnoise.benchmarks.fedsvd import baseline_of, climb, main, show_difference, table
from hfnoise.benchmarks.fedsvd_runs import BASELINE, METHODS, Outcome


def outcome(accuracy, epsilons=None, bytes_down=(8, 8)):
    return Outcome(accuracy, {8: accuracy}, list(bytes_down), 8, epsilons or {}, {"a": 2}, {}, {"a": 100})


@pytest.mark.parametrize("best", [2.0, 6.0, 18.0, 54.0])
def test_climb_ends_where_both_neighbours_are_worse(best):
    found, tried = climb(lambda rate: -abs(rate - best), 6.0)
    assert found == pytest.approx(best)
    assert min(tried) < found < max(tried)


def test_climb_stops_on_a_plateau_and_at_its_limit():
    assert climb(lambda rate: 0.5, 6.0)[0] == 6.0
    assert climb(lambda rate: rate, 1.0)[0] == 3.0**4


def test_differences_are_paired_and_have_no_sign_of_nothing():
    assert show_difference([0.01, 0.03]) == "+2.0 ± 1.0"
    assert show_difference([-1e-9, -1e-9]) == "+0.0 ± 0.0"
    assert show_difference([-0.02]) == "-2.0"


def test_every_baseline_shares_optimizer_and_rows():
    for name, method in METHODS.items():
        base = METHODS[baseline_of(name)]
        assert (base.aggregation, base.init_lora_A, base.optim) == ("ffa", "orthonormal", method.optim)


def test_table():
    outcomes = {
        BASELINE: {"no privacy": [outcome(0.4), outcome(0.5)]},
        "FedSVD": {"no privacy": [outcome(0.41, {"a": 5.99}), outcome(0.51, {"a": 5.5}, (8, 20))]},
    }
    header, rows = table(outcomes, {name: {"no privacy": 6.0} for name in outcomes})
    assert [len(row) for row in rows] == [len(header)] * 2
    assert rows[0][2] == "" and rows[1][2] == "+1.0 ± 0.0"
    assert rows[1][-3:] == ["8 (20)", "8", "5.9900"]


def test_a_tuning_seed_is_not_reported(capsys, tmp_path):
    from hfnoise.errors import UsageError

    with pytest.raises(UsageError, match="--tuning_seed 1 is among --seeds"):
        main(["--seeds", "0", "1", "--tuning_seed", "1", "--output_dir", str(tmp_path)])
