"""What happens between rounds: one ledger over all of them, a round that broke off, a budget that ends early."""

import pytest
from transformers import TrainerCallback

from hfnoise import ClientDropout, DPConfig, FedSVDClient, simulate_federation
from hfnoise.privacy import compute_epsilon
from hfnoise.trainers.federated_client import STATE_FILE


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
