"""FedSVD on Flower, in process: what travels, who is averaged, what is refused, what is remembered."""

import gc
import json
import math
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'hfnoise[flower]'")

from flwr.app import ConfigRecord, Error, Message, RecordDict  # noqa: E402
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto  # noqa: E402
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg  # noqa: E402

from hfnoise.privacy.accounting import composed_epsilon  # noqa: E402
from hfnoise.privacy.ledger import LedgerEntry  # noqa: E402
from hfnoise.trainers.federated import FedSVDClient, simulate_federation  # noqa: E402
from hfnoise.trainers.federated_flower import (  # noqa: E402
    fedsvd_client_app,
    fedsvd_server_app,
    fedsvd_strategy,
    run_config_settings,
)
from hfnoise.trainers.federated_flower_records import array_record, message_from_records  # noqa: E402
from tests.trainers.flower_world import (  # noqa: E402
    CONFIG,
    InProcess,
    adapted,
    federate,
    identify,
    new_server,
    plain_trainer,
)


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Accelerate collects garbage before every training, which takes longer than the training here."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def world(tiny_model_path, tmp_path, monkeypatch):
    """Return `make(config)`: server, strategy and grid of a federation of plain Trainers."""
    identify(monkeypatch)

    def make(config=CONFIG):
        def make_trainer(context):
            client = context.node_config["partition-id"]
            model = adapted(tiny_model_path, config.aggregation != "fedavg")
            return plain_trainer(model, client, tmp_path / f"trainer{client}")

        grid = InProcess(fedsvd_client_app(make_trainer, config, clients=2))
        server = new_server(tiny_model_path, config)
        return server, fedsvd_strategy(server), grid

    return make


def simulated(path, config, folder):
    """Return the server of the same federation without Flower."""
    server = new_server(path, config)
    models = [adapted(path, config.aggregation != "fedavg") for _ in range(2)]
    clients = [
        FedSVDClient(f"client-{k}", plain_trainer(model, k, folder), config, clients=2)
        for k, model in enumerate(models)
    ]
    simulate_federation(server, clients, progress=False)
    return server


def assert_equal(one, other):
    for name, factors in one.factors().items():
        for mine, theirs in zip(factors, other.factors()[name], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
    for name, folded in one.folded().items():
        torch.testing.assert_close(folded.dense(), other.folded()[name].dense(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"aggregation": "ffa", "weighting": "uniform"}, marks=pytest.mark.slow),
        pytest.param({"aggregation": "fedavg"}, marks=pytest.mark.slow),
        pytest.param({"init_lora_A": "w0_svd", "rounds": 3}, marks=pytest.mark.slow),
        pytest.param({"subspace": "refresh", "refresh_every": 2, "rounds": 5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_as_simulated(settings, world, tiny_model_path, tmp_path):
    config = replace(CONFIG, **settings)
    server, strategy, grid = world(config)
    federate(server, strategy, grid)
    assert server.round == config.rounds
    assert any(bool(factors.lora_B.any()) for factors in server.factors().values())
    assert_equal(server, simulated(tiny_model_path, config, tmp_path))
    # Only the factors that are trained, under the keys of the answer, and what a client lacks once only.
    names = {"lora_B|" + name for name in server.names} | {
        "lora_A|" + name for name in server.names if config.aggregation == "fedavg"
    }
    assert all(set(content["arrays"]) == names for _, content in grid.sent)
    starts = ["start" in content for _, content in grid.sent]
    assert starts == [config.init_lora_A == "w0_svd"] * 2 + [False] * (len(starts) - 2)


def test_message_is_B_and_r_squared_floats(world):
    server, strategy, grid = world()
    federate(server, strategy, grid, rounds=1)
    record = strategy.records[0]
    factors = list(server.factors().values())
    assert record.bytes_up == sum(4 * one.lora_B.numel() for one in factors)
    assert record.bytes_down - record.bytes_up == sum(4 * 2**2 for _ in factors)
    content = grid.sent[0][1]
    assert content["arrays"].count_bytes() >= record.bytes_up
    assert message_from_records(content).nbytes == record.bytes_down


@pytest.mark.slow
def test_flowers_privacy_wrappers_accept_the_strategy(world):
    server, strategy, grid = world()
    assert isinstance(strategy, FedAvg) and type(strategy).aggregate_train is FedAvg.aggregate_train
    wrapped = DifferentialPrivacyServerSideFixedClipping(
        strategy, noise_multiplier=0.0, clipping_norm=1e-3, num_sampled_clients=2
    )
    result = wrapped.start(grid, strategy.initial_arrays(), num_rounds=2)
    strategy.take_average(result.arrays)
    assert len(strategy.records) == 2 and server.rotate() == 2
    # Clipped from what clients got: two rounds move B by at most twice the norm.
    total = sum(float(factors.lora_B.square().sum()) for factors in server.factors().values())
    assert 0 < math.sqrt(total) <= 2e-3 * 1.001


def test_stale_and_corrupted_rotations_are_refused_and_the_round_goes_on(world):
    server, strategy, grid = world()
    federate(server, strategy, grid, rounds=1)
    first = grid.sent[0][1]

    def corrupt(node, content):
        if node == 1:
            return RecordDict({**first, "config": ConfigRecord({**first["config"], "hfnoise-factors": "other"})})
        data = bytearray(content["config"]["hfnoise-rotations"])
        data[-1] ^= 1  # one bit
        content["config"]["hfnoise-rotations"] = bytes(data)
        return content

    grid.tamper = corrupt
    # One gets another message of a round that it has answered, the other a rotation with a flipped bit.
    before = [context.state["hfnoise-client"]["content"] for context in grid.contexts.values()]
    federate(server, strategy, grid, rounds=1)
    assert server.round == 1 and strategy.records[-1].answered == []
    assert [context.state["hfnoise-client"]["content"] for context in grid.contexts.values()] == before
    replies = [
        grid.app(Message(corrupt(2, content), 2, "train"), grid.contexts[2]) for node, content in grid.sent[-1:]
    ]
    assert replies[0].error.reason.startswith("StaleRotationError") and "SHA-256" in replies[0].error.reason
    grid.tamper = lambda node, content: content
    federate(server, strategy, grid, rounds=1)
    assert server.round == 2 and strategy.records[-1].answered == ["client-0", "client-1"]


def test_answer_is_sent_again_and_counted_once(world, tmp_path):
    server, _, grid = world()
    strategy = fedsvd_strategy(server, min_available_nodes=1)
    grid.contexts.clear()
    grid.join(1, 0, **{"state-dir": str(tmp_path)})
    message = strategy.configure_train(1, strategy.initial_arrays(), ConfigRecord(), grid)
    answers = grid.send_and_receive(message)
    answers += grid.send_and_receive(message)
    grid.join(1, 0, **{"state-dir": str(tmp_path)})  # another run: Flower's state is gone, the folder is not
    answers += grid.send_and_receive(message)
    assert [answer.content["metrics"]["participations"] for answer in answers] == [1, 1, 1]
    assert len({answer.content.object_id for answer in answers}) == 1


def test_cap_is_kept_and_the_others_go_on(world):
    config = replace(CONFIG, rounds=3)
    server, strategy, grid = world(config)
    grid.contexts[1].node_config["max-participations"] = 1
    federate(server, strategy, grid)
    assert [record.answered for record in strategy.records] == [["client-0", "client-1"], ["client-1"], ["client-1"]]
    # It said so once, and is not asked again.
    assert [len(record.chosen) for record in strategy.records] == [2, 2, 1]
    assert server.participants["client-0"].participations == 1


def test_silent_clients_rest_and_late_ones_join(world):
    server, strategy, grid = world(replace(CONFIG, rounds=5, init_lora_A="w0_svd"))
    federate(server, strategy, grid, rounds=1)
    grid.dead = {2}
    federate(server, strategy, grid, rounds=2)
    assert [record.chosen for record in strategy.records[1:]] == [["client-0", "client-1"], ["client-0"]]
    grid.join(3, 2)
    federate(server, strategy, grid, rounds=1)
    # The dead one is asked again after its rest, in vain; only who joins gets the rows.
    assert strategy.records[-1].answered == ["client-0", "client-2"] and len(strategy.records[-1].chosen) == 3
    assert {node: "start" in content for node, content in grid.sent[-3:]} == {1: False, 2: True, 3: True}


def broken_nan(content):
    content["arrays"] = array_record(
        {name: torch.full(array.shape, math.nan) for name, array in content["arrays"].items()}
    )


def broken_weight(content):
    content["metrics"]["num-examples"] = 10**6


def broken_round(content):
    content["config"]["hfnoise-update"] = json.dumps(json.loads(content["config"]["hfnoise-update"]) | {"round": 7})


def broken_dtype(content):
    from flwr.app import Array

    content["arrays"] = type(content["arrays"])(
        {name: Array(array.numpy().astype("float16")) for name, array in content["arrays"].items()}
    )


def broken_layers(content):
    del content["arrays"][next(iter(content["arrays"]))]


def broken_scalings(content):
    content["config"]["hfnoise-update"] = json.dumps(
        json.loads(content["config"]["hfnoise-update"]) | {"scalings": {}}
    )


def broken_metrics(content):
    content["metrics"]["loss"] = 1.0


DAMAGES = (
    broken_nan, broken_weight, broken_round, broken_dtype, broken_layers, broken_scalings, broken_metrics,
    RecordDict.clear,
)  # fmt: skip


def test_bad_answers_are_left_out(world, caplog):
    server, strategy, grid = world()
    messages = strategy.configure_train(1, strategy.initial_arrays(), ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    good = replies[1].content["arrays"].to_numpy_ndarrays()
    for damage in DAMAGES:
        bad = Message(recorddict_from_proto(recorddict_to_proto(replies[0].content)), reply_to=messages[0])
        damage(bad.content)
        caplog.clear()
        arrays, metrics = strategy.aggregate_train(1, [bad, replies[1]])
        assert strategy.records[-1].answered == ["client-1"] and "is left out" in caplog.text, damage
        assert all((one == other).all() for one, other in zip(arrays.to_numpy_ndarrays(), good, strict=True))
        assert metrics["epsilon"] == math.inf  # nobody is private here


def test_bfloat16_is_refused():
    with pytest.raises(TypeError, match="lora_B.q_proj is torch.bfloat16: Flower averages NumPy arrays"):
        array_record({"lora_B|q_proj": torch.zeros(2, 2, dtype=torch.bfloat16)})


@pytest.mark.parametrize("method", ["flora", "fedex"])
def test_stacking_methods_are_refused_by_name(method, tiny_model_path):
    with pytest.raises(ValueError, match=f"aggregation='{method}' does not run over Flower.*simulate_federation"):
        fedsvd_strategy(new_server(tiny_model_path, replace(CONFIG, aggregation=method)))


@pytest.mark.parametrize("settings", [{"r": 4}, {"lora_alpha": 8}], ids=str)
def test_other_ranks_and_scalings_are_refused(settings, world, tiny_model_path, tmp_path, caplog):
    server, strategy, grid = world()
    odd = fedsvd_client_app(
        lambda context: plain_trainer(adapted(tiny_model_path, **settings), 0, tmp_path / "odd"), CONFIG, clients=2
    )
    usual, grid.app = grid.app, lambda message, context: (odd if context.node_id == 1 else usual)(message, context)
    federate(server, strategy, grid, rounds=1)
    assert strategy.records[0].answered == ["client-1"]
    assert "rank" in caplog.text and "ValueError" in caplog.text or "Flower averages entry by entry" in caplog.text


def test_without_flower_the_extra_is_named(monkeypatch, tiny_model_path):
    server = new_server(tiny_model_path)
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    for call in (
        lambda: fedsvd_client_app(lambda context: None),
        lambda: fedsvd_server_app(lambda context: None),
        lambda: array_record({"lora_B|q_proj": torch.zeros(1)}),
    ):
        with pytest.raises(ImportError, match=r"pip install 'hfnoise\[flower\]'"):
            call()
    from hfnoise.trainers import federated_flower_strategy

    federated_flower_strategy._strategy_class.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'hfnoise\[flower\]'"):
        fedsvd_strategy(server)


def test_run_configuration_is_read():
    config = run_config_settings({"local-steps": 3, "init-lora_A": "kaiming", "rounds": 7, "learning-rate": 0.1})
    assert (config.local_steps, config.init_lora_A, config.rounds) == (3, "kaiming", 7)
    with pytest.raises(ValueError, match="aggregation must be one of"):
        run_config_settings({"aggregation": "mean"})


def test_server_app_saves_resumes_and_reports(world, tiny_model_path, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "federation"
    _, _, grid = world()

    def run(rounds):
        app = fedsvd_server_app(
            lambda context: adapted(tiny_model_path), output_dir=folder, evaluate=lambda server: {"seen": server.round}
        )
        settings = {"clients": 2, "local-steps": 1, "rounds": rounds, "round-timeout": 5.0}
        context = grid.contexts[1]
        app(grid, type(context)(1, 1, {}, RecordDict(), settings))
        return json.loads((folder / "federation_report.json").read_text())

    assert run(1)["rounds"] == 1
    report = run(2)  # another process would load the same
    assert [one["round"] for one in report["history"]] == [0, 1] and report["rounds"] == 2
    assert [one["metrics"] for one in report["history"]] == [{"seen": 0}, {"seen": 1}]
    assert report["clients"]["client-1"]["participations"] == 2 and report["clients"]["client-1"]["examples"] == 16
    table = capsys.readouterr().out
    assert "client-0, client-1" in table and "bytes down" in table and "none" in table
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), folder / "adapter")


@pytest.mark.slow
def test_clients_evaluate_only_where_they_were_told_to(world, tiny_model_path, tmp_path):
    def make_trainer(context):
        trainer = plain_trainer(adapted(tiny_model_path), 0, tmp_path / "evaluating")
        trainer.eval_dataset = trainer.train_dataset
        return trainer

    server, _, grid = world()
    strategy = fedsvd_strategy(server, fraction_evaluate=1.0)
    told, other = fedsvd_client_app(make_trainer, CONFIG, clients=2, evaluate=True), grid.app
    grid.app = lambda message, context: (told if context.node_id == 1 else other)(message, context)
    result = federate(server, strategy, grid, rounds=2)
    losses = [metrics["eval_loss"] for metrics in result.evaluate_metrics_clientapp.values()]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert server.round == 2 and len(strategy.records[1].answered) == 2  # it counts as no round
    reply = other(Message(grid.sent[-1][1], 2, "evaluate"), grid.contexts[2])
    assert isinstance(reply.error, Error) and "leave it without noise" in reply.error.reason


@pytest.fixture
def private(make_private_trainer, tiny_model_path, monkeypatch, tmp_path):
    """Return strategy and grid of a federation with one client, which is private, and its ledger file."""
    identify(monkeypatch)
    config, ledger = replace(CONFIG, max_participations=2), tmp_path / "ledger.json"

    def make_trainer(context):
        settings = {"noise_multiplier": 2.0, "unsafe_seed": 3, "ledger_file": str(ledger)}
        return make_private_trainer(dp=settings, model=adapted(tiny_model_path), peft=False)

    grid = InProcess(fedsvd_client_app(make_trainer, config))
    del grid.contexts[2]
    return fedsvd_strategy(new_server(tiny_model_path, config), min_available_nodes=1), grid, ledger


@pytest.mark.slow
def test_epsilon_is_that_of_the_whole_ledger_even_if_the_file_is_lost(private):
    strategy, grid, ledger = private
    server = strategy.server
    federate(server, strategy, grid, rounds=1)
    first = server.epsilon()
    ledger.unlink()
    result = federate(server, strategy, grid, rounds=1)
    entries = next(iter(json.loads(ledger.read_text())["datasets"].values()))
    whole = composed_epsilon(
        [LedgerEntry(**entry).mechanism for entry in entries], server.participants["client-0"].delta
    )
    assert len(entries) == 2 and 0 < first < server.epsilon() == pytest.approx(whole)
    assert result.train_metrics_clientapp[1]["epsilon"] == pytest.approx(whole)
    federate(server, strategy, grid, rounds=1)
    assert strategy.records[-1].answered == [] and server.epsilon() == pytest.approx(whole)  # the cap
