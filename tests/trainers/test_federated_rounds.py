"""What happens between rounds: one ledger over all of them, a round that broke off, a budget that ends early."""

from dataclasses import replace

import pytest
from transformers import TrainerCallback

from hfnoise import ClientDropout, simulate_federation
from hfnoise.privacy import StaleRotationError, compute_epsilon
from hfnoise.privacy.ledger import LedgerEntry


@pytest.mark.slow
def test_epsilon_of_a_known_seed_is_that_of_all_rounds_without_a_folder(make_federation):
    """A Trainer with unsafe_seed empties its ledger when it starts; a client starts it in every round."""
    dp = {"noise_multiplier": 1.0, "target_delta": 1e-3}
    server, (client,), _ = make_federation(clients=1, steps=1, dp=dp, folder=False)
    for rounds in (1, 2):
        server.aggregate([client.step(server.message(client.last_round))])
        expected = compute_epsilon(1.0, client.trainer.sample_rate, rounds, 1e-3)
        assert client.epsilon() == pytest.approx(expected)
    _, (fresh,), _ = make_federation(clients=1, steps=1, dp=dp, folder=False)
    assert fresh.epsilon() == 0.0, "what a test released before spends nothing"


def test_banded_noise_cannot_keep_a_budget_over_rounds(make_federation):
    with pytest.raises(ValueError, match="noise='banded' begins anew in every round"):
        make_federation(clients=1, steps=4, dp={"target_epsilon": 6.0, "noise": "banded", "bands": 2})
    _, clients, _ = make_federation(clients=1, steps=4, dp={"noise_multiplier": 1.0, "noise": "banded", "bands": 2})
    assert clients[0].trainer.dp_config.bands == 2


class DropsOut(TrainerCallback):
    """Breaks the first training off after its first step."""

    done = False

    def on_step_end(self, args, state, control, **kwargs):
        if not self.done:
            self.done = True
            raise ClientDropout("lost power")


def test_round_that_broke_off_is_tried_again_and_counts(make_federation):
    server, (client,), _ = make_federation(clients=1, steps=1, rounds=1, max_participations=2)
    client.trainer.add_callback(DropsOut())
    (record,) = simulate_federation(server, [client], progress=False)
    assert record.answered == ["client0"] and client.participations == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"subspace": "refresh", "refresh_every": 1},
        pytest.param({"aggregation": "fedex"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_message_may_come_twice(settings, make_federation):
    """For an evaluation and then for the training, or after a round that broke off; with updates folded in it."""
    server, (client,), _ = make_federation(clients=1, steps=1, **settings)
    for _ in range(3):
        message = server.message(client.last_round)
        client.take(message)
        server.aggregate([client.step(message)])
        server.rotate()
    folded = len(client._folded["model.layers.0.self_attn.q_proj"])
    assert folded == 2, "each update once"
    with pytest.raises(StaleRotationError, match="answered round 2 already"):
        client.step(message)


@pytest.mark.slow
def test_stale_message_of_any_method_is_refused(make_federation):
    server, (client, other), _ = make_federation(clients=2, steps=1, aggregation="ffa")
    old = server.message(None)
    for _ in range(2):
        server.aggregate([client.step(server.message(client.last_round))])
    with pytest.raises(StaleRotationError, match="holds round 1 already, and got a message of round 0"):
        client.step(old)
    assert client.participations == 2


@pytest.mark.slow
def test_client_that_has_spent_its_budget_leaves_the_others_alone(make_federation, caplog):
    """The noise was calibrated to one round; then a round was added, which the cap follows and the budget does not."""
    dp = {"target_epsilon": 6.0, "target_delta": 1e-3}
    server, clients, _ = make_federation(clients=2, steps=1, rounds=1, dp=dp)
    clients[0].step(server.message(None))
    server, clients, _ = make_federation(clients=2, steps=1, rounds=2, dp=dp)
    records = simulate_federation(server, clients, progress=False)
    assert [record.answered for record in records] == [["client1"], ["client1"]]
    assert "client0 takes no further part from round 0 on: target_epsilon=6 is spent" in caplog.text
    assert clients[0].participations == 1, "nothing was trained"


def test_hidden_numbers_of_examples_are_in_no_answer(make_federation):
    """The default delta of more than 10,000 units is 1 / (10 units); 1e-5 holds as well and tells nothing."""
    dp = {"noise_multiplier": 1.0, "accountant": "rdp"}
    server, (client,), _ = make_federation(clients=1, steps=1, dp=dp, weighting="uniform")
    client.trainer.target_delta = 1 / (10 * 34_567)
    update = client.step(server.message(None))
    assert update.examples is None and update.delta == 1e-5
    with pytest.raises(ValueError, match="weighting='uniform' hides them"):
        server.aggregate([replace(update, examples=12)])
    server.aggregate([update])
    assert server.report()["clients"]["client0"]["examples"] is None


@pytest.mark.slow
def test_client_whose_data_have_no_budget_left_leaves_the_others_alone(make_federation, caplog):
    """Another run has spent it before the federation; that client was never calibrated."""
    dp = {"target_epsilon": 6.0, "target_delta": 1e-3}
    server, clients, _ = make_federation(clients=2, steps=1, rounds=2, dp=dp)
    entry = LedgerEntry("earlier", sample_rate=0.5, noise_multiplier=0.3, steps=9)
    clients[0].trainer._ledger().charge(entry)
    records = simulate_federation(server, clients, progress=False)
    assert [record.answered for record in records] == [["client1"], ["client1"]]
    assert "client0 takes no further part from round 0 on" in caplog.text


def test_client_without_a_folder_is_told_of_its_rounds_by_the_server(make_federation, tmp_path):
    server, clients, _ = make_federation(clients=1, steps=1, rounds=2, folder=False)

    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_federation(server, clients, progress=False, output_dir=tmp_path, on_round=stop)
    server, (client,), _ = make_federation(clients=1, steps=1, rounds=2, folder=False)
    simulate_federation(server, [client], progress=False, output_dir=tmp_path, resume=True)
    assert client.participations == client.cap == 2


def test_arguments_of_the_simulation_are_checked_before_a_round(make_federation):
    server, clients, _ = make_federation(clients=1)
    with pytest.raises(ValueError, match="evaluate_every must be a whole number of at least 1, got 0"):
        simulate_federation(server, clients, evaluate=lambda server: {}, evaluate_every=0)
    with pytest.raises(ValueError, match="resume=True needs output_dir"):
        simulate_federation(server, clients, resume=True)
    assert clients[0].participations == 0
