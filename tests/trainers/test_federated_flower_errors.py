"""What a Flower client says of its errors: the server is told what was refused, never what a row was."""

import pytest

pytest.importorskip("flwr")

from flwr.app import ConfigRecord

from hfnoise.trainers.federated_flower import fedsvd_client_app, fedsvd_strategy
from tests.trainers.flower_world import CONFIG, InProcess, adapted, identify, new_server, plain_trainer


@pytest.mark.parametrize("kind", [ValueError, KeyError])
@pytest.mark.parametrize("doing", ["building the Trainer", "training"])
def test_errors_that_may_quote_data_stay_with_the_client(kind, doing, tiny_model_path, tmp_path, caplog, monkeypatch):
    identify(monkeypatch)

    def fail(*_, **__):
        raise kind("Alice has the flu")

    def make_trainer(context):
        trainer = plain_trainer(adapted(tiny_model_path), 0, tmp_path) if doing == "training" else fail()
        trainer.data_collator = fail
        return trainer

    strategy = fedsvd_strategy(new_server(tiny_model_path, CONFIG))
    grid = InProcess(fedsvd_client_app(make_trainer, CONFIG, clients=2))
    replies = grid.send_and_receive(strategy.configure_train(1, strategy.initial_arrays(), ConfigRecord(), grid))
    assert [reply.error.reason.split(";")[0] for reply in replies] == 2 * [
        f"ValueError: {doing} failed with {kind.__name__}"
    ]
    assert not any("Alice" in reply.error.reason for reply in replies) and "Alice" in caplog.text
