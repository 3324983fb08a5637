"""A federation end to end on the tiny model: rounds, caps, ledgers, hashes, resume, export, and the theorem."""

from dataclasses import replace
from random import Random

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hfnoise import ClientDropout, FedSVDConfig, FedSVDServer, simulate_federation
from hfnoise.privacy import StaleRotationError, compute_epsilon
from hfnoise.trainers.federated import ParticipationError
from hfnoise.trainers.federated_message import FederationMessage
from hfnoise.trainers.federated_simulation import choose_clients


def products(server):
    """The update of every weight: folded parts included."""
    folded = server.folded()
    return {
        name: server.scalings[name] * part.dense().double() + (folded[name].dense() if name in folded else 0)
        for name, part in server.factors().items()
    }


def difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "settings",
    [
        {"aggregation": "fedsvd"},
        {"aggregation": "fedsvd", "subspace": "refresh", "refresh_every": 2},
        pytest.param({"aggregation": "fedex"}, marks=SLOW),
        pytest.param({"aggregation": "ffa", "init_lora_A": "kaiming"}, marks=SLOW),
        pytest.param({"aggregation": "fedavg", "init_lora_A": "keep"}, marks=SLOW),
        pytest.param({"aggregation": "flora"}, marks=SLOW),
        pytest.param({"aggregation": "fedsvd", "init_lora_A": "w0_svd"}, marks=SLOW),
        pytest.param(
            {"aggregation": "fedsvd", "subspace": "refresh", "refresh_every": 1, "refresh_directions": 1}, marks=SLOW
        ),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_federation_trains_exports_and_reloads(settings, make_federation, tiny_model_path, tmp_path):
    server, clients, model = make_federation(clients_per_round=2, **settings)
    records = simulate_federation(server, clients, progress=False, output_dir=tmp_path / "server")
    assert [record.round for record in records] == [0, 1, 2]
    assert all(len(record.answered) == 2 for record in records)
    assert difference(products(server), products(FedSVDServer(model, server.config))) > 1e-4, "nothing was learnt"

    server.apply_to(model).eval()
    input_ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(input_ids).logits
    server.export_adapter(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(stock.eval()(input_ids).logits, expected, atol=1e-5)

    again = FedSVDServer(model, server.config)
    again.load(tmp_path / "server")
    assert again.rotate() == server.rotate() == 3
    for name, factors in server.factors().items():
        assert torch.equal(factors.lora_A, again.factors()[name].lora_A)
        assert torch.equal(factors.lora_B, again.factors()[name].lora_B)
    assert again.report() == server.report()


@pytest.mark.slow
def test_fedsvd_is_ffa_with_orthonormal_rows_under_sgd(make_federation, tmp_path):
    """The theorem of docs/fedsvd.md through whole Trainers, clipping by norm included; see also the core's test."""
    runs = []
    for aggregation in ("fedsvd", "ffa"):
        server, clients, _ = make_federation(aggregation=aggregation, folder=tmp_path / aggregation, clients=2)
        simulate_federation(server, clients, progress=False)
        runs.append(products(server))
    size = max(float(value.abs().max()) for value in runs[0].values())
    assert difference(*runs) < 1e-5 * size


@pytest.mark.slow
def test_fedsvd_is_not_ffa_under_adam(make_federation, tmp_path):
    runs = []
    for aggregation in ("fedsvd", "ffa"):
        server, clients, _ = make_federation(
            aggregation=aggregation, folder=tmp_path / aggregation, optim="adamw_torch"
        )
        simulate_federation(server, clients, progress=False)
        runs.append(products(server))
    assert difference(*runs) > 1e-2


def test_message_is_b_and_r_squared_numbers(make_federation):
    server, clients, _ = make_federation(rounds=1)
    simulate_federation(server, clients, progress=False)
    for since in (0, None):
        message = server.message(since)
        size = sum(value.numel() for value in message.lora_B.values())
        assert message.floats == size + sum(one.rank**2 for one in server.rotations.values())


def test_message_travels_as_arrays_and_json(make_federation):
    server, clients, _ = make_federation(subspace="refresh", refresh_every=1)
    server.aggregate([client.step(server.message(None)) for client in clients])
    for since in (0, None):
        message = server.message(since)
        again = FederationMessage.assemble(message.description(), message.tensors())
        assert again.description() == message.description()
        assert again.tensors().keys() == message.tensors().keys()
        assert all(torch.equal(value, message.tensors()[name]) for name, value in again.tensors().items())
    with pytest.raises(ValueError, match="it was cut"):
        FederationMessage.assemble(message.description(), dict(list(message.tensors().items())[1:]))


@pytest.mark.slow
def test_epsilon_is_that_of_the_ledger(make_federation):
    """Noise is calibrated to the cap; who took part less often has spent less, and nobody more than the target."""
    server, clients, _ = make_federation(
        dp={"target_epsilon": 6.0, "target_delta": 1e-3}, rounds=3, clients_per_round=2
    )
    records = simulate_federation(server, clients, progress=False)
    for client in clients:
        rate, noise = client.trainer.sample_rate, client.noise_multiplier
        whole = compute_epsilon(noise, rate, 2 * client.cap, 1e-3)
        assert 5.9 < whole <= 6.0
        assert client.epsilon() == pytest.approx(compute_epsilon(noise, rate, 2 * client.participations, 1e-3))
        assert client.participations <= client.cap == 2
    assert records[0].epsilon < records[-1].epsilon <= 6.0
    assert server.epsilon() == max(client.epsilon() for client in clients)
    assert len({client.noise_multiplier for client in clients}) == 1


def test_client_refuses_a_round_beyond_its_cap(make_federation):
    server, clients, _ = make_federation(clients=1, max_participations=1)
    client = clients[0]
    server.aggregate([client.step(server.message(None))])
    before = client.layers.read()
    with pytest.raises(ParticipationError, match="the most that its noise is calibrated to"):
        client.step(server.message(client.last_round))
    assert all(torch.equal(before[name].lora_B, now.lora_B) for name, now in client.layers.read().items())


@pytest.mark.slow
def test_client_remembers_its_rounds_after_a_restart(make_federation):
    server, clients, _ = make_federation(clients=1, max_participations=1)
    clients[0].step(server.message(None))
    _, restarted, _ = make_federation(clients=1, max_participations=1)
    with pytest.raises(ParticipationError, match="max_participations=1"):
        restarted[0].step(server.message(None))


def test_same_data_never_gets_the_same_noise_in_two_rounds(make_federation):
    """With a known seed as well: equal noise in two rounds would cancel in their difference."""
    server, clients, _ = make_federation(clients=1, dp={"noise_multiplier": 50.0, "clip_norm": 1e-3})
    deltas = []
    for _ in range(2):
        message = server.message(clients[0].last_round)
        update = clients[0].step(message)
        name = server.names[0]
        deltas.append(update.lora_B[name] - message.lora_B[name])
        server.aggregate([update])
    assert not torch.allclose(deltas[0].norm(), deltas[1].norm(), rtol=1e-6)


@pytest.mark.parametrize("break_it", ["bit", "stale", "twice"])
def test_wrong_rotations_are_refused(break_it, make_federation):
    server, clients, _ = make_federation(clients=2)
    first = server.message(None)
    server.aggregate([client.step(first) for client in clients])
    message, wording = server.message(0), "SHA-256"
    if break_it == "bit":
        name = server.names[0]
        broken = message.rotations[name]._replace(rotation=message.rotations[name].rotation.bfloat16().float())
        message = replace(message, rotations={**message.rotations, name: broken})
    elif break_it == "stale":
        message, wording = replace(message, round=2), "stale"
    else:
        message, wording = first, "has answered round 0 already"
    participations = clients[0].participations
    with pytest.raises(StaleRotationError, match=wording):
        clients[0].step(message)
    assert clients[0].participations == participations, "nothing was trained, so nothing counts"


def test_client_that_missed_a_refresh_gets_the_rows_anew(make_federation):
    server, clients, _ = make_federation(subspace="refresh", refresh_every=1, rounds=4)
    server.aggregate([client.step(server.message(client.last_round)) for client in clients])
    for _ in range(2):
        server.aggregate([client.step(server.message(client.last_round)) for client in clients[:2]])
    late, attending = clients[2], clients[0]
    with pytest.raises(StaleRotationError, match="it missed a round"):
        late.step(server.message(2))
    assert late.participations == 1
    message = server.message(late.last_round)
    assert message.start and len(message.folded[server.names[0]]) == 3
    late.step(message)
    attending.step(server.message(attending.last_round))
    for name in server.names:
        assert torch.equal(late._rotations[name].lora_A, attending._rotations[name].lora_A)
        folded = [torch.stack([part.dense() for part in client._folded[name]]) for client in (late, attending)]
        assert torch.allclose(*folded, atol=1e-7)


@pytest.mark.slow
def test_dropouts_leave_the_round_to_the_others(make_federation):
    server, clients, _ = make_federation(rounds=2)
    step = clients[1].step

    def sometimes(message):
        if message.round == 0:
            raise ClientDropout("lost power")
        return step(message)

    clients[1].step = sometimes
    records = simulate_federation(server, clients, progress=False)
    assert records[0].chosen == ["client0", "client1", "client2"]
    assert records[0].answered == ["client0", "client2"]
    assert records[1].answered == ["client0", "client1", "client2"]


@pytest.mark.slow
def test_different_ranks(make_federation, tmp_path):
    """A client of rank 1 holds the first direction of the server; "ffa" averages entries and refuses it."""
    server, clients, _ = make_federation(ranks=(2, 1, 2))
    simulate_federation(server, clients, progress=False)
    assert {one.rank for one in server.rotations.values()} == {2}
    server, clients, _ = make_federation(ranks=(2, 1, 2), aggregation="ffa", folder=tmp_path / "ffa")
    with pytest.raises(ValueError, match="has rank 1 and scaling 2, the server's 2 and 2"):
        clients[1].step(server.message(None))
    assert clients[1].participations == 0, "nothing was trained, so nothing counts"


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(make_federation, tmp_path):
    dp = {"noise_multiplier": 1.0}
    server, clients, _ = make_federation(folder=tmp_path / "whole", dp=dp, clients_per_round=2)
    simulate_federation(server, clients, progress=False)

    stopped, clients, _ = make_federation(folder=tmp_path / "parts", dp=dp, clients_per_round=2)

    def stop(record):
        if record.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_federation(stopped, clients, progress=False, output_dir=tmp_path / "state", on_round=stop)
    resumed, clients, _ = make_federation(folder=tmp_path / "parts", dp=dp, clients_per_round=2)
    records = simulate_federation(resumed, clients, progress=False, output_dir=tmp_path / "state", resume=True)
    assert [record.round for record in records] == [2]
    assert difference(products(server), products(resumed)) == 0.0


def test_bad_updates_are_refused_and_leave_the_state(make_federation):
    server, clients, _ = make_federation(clients=2)
    update = clients[0].step(server.message(None))
    name = server.names[0]
    bad = {
        "no client answered": [],
        "answered twice": [update, update],
        "is at round 0": [replace(update, round=3)],
        "other layers": [replace(update, lora_B={})],
        "another base": [replace(update, base="4 bits")],
        "0 as its number of examples": [replace(update, examples=0)],
        "-3 as its number of examples": [replace(update, examples=-3)],
        "inf as its number of examples": [replace(update, examples=float("inf"))],
        "a scaling .* for each layer": [replace(update, scalings={})],
        "gives epsilon=nan": [replace(update, epsilon=float("nan"))],
        "sent lora_A": [replace(update, lora_A=update.lora_B)],
        "bfloat16": [replace(update, lora_B={k: v.bfloat16() for k, v in update.lora_B.items()})],
        "finite": [replace(update, lora_B={**update.lora_B, name: update.lora_B[name] * float("nan")})],
    }
    for wording, updates in bad.items():
        with pytest.raises((ValueError, TypeError), match=wording):
            server.aggregate(updates)
        assert server.message(0).round == 0 and not server.participants
    server.aggregate([update])
    assert server.rotate() == 1


def test_clients_of_another_base_or_method_are_refused(make_federation):
    server, clients, _ = make_federation(clients=1)
    message = server.message(None)
    for change, wording in (
        ({"base": "other"}, "the base of client 'client0' is not the server's"),
        ({"method": "ffa"}, "Give both the same FedSVDConfig"),
        ({"lora_B": {}}, "other layers than the server"),
        ({"federation_seed": 7}, "it would train B for other rows"),
        ({"scalings": dict.fromkeys(message.scalings, 4.0), "method": "ffa"}, "same FedSVDConfig"),
    ):
        with pytest.raises(ValueError, match=wording):
            clients[0].step(replace(message, **change))
    assert clients[0].participations == 0


def test_trainers_that_cannot_take_part(make_federation, tmp_path):
    from hfnoise import FedSVDClient

    server, clients, model = make_federation(clients=1)
    trainer = clients[0].trainer
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 2 and parameter.requires_grad)
    clients[0].layers[server.names[0]].lora_A.requires_grad_(True)
    with pytest.raises(ValueError, match="trains B only, and lora_A of"):
        FedSVDClient("other", trainer, server.config)
    clients[0].layers[server.names[0]].lora_A.requires_grad_(False)
    with pytest.raises(TypeError, match=r"a client needs a built transformers\.Trainer"):
        FedSVDClient("other", "a trainer", server.config)
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="whose state would go on over rounds"):
        FedSVDClient("other", trainer, server.config)
    trainer.optimizer = None
    trainer.train_dataset = trainer.train_dataset.select([])
    with pytest.raises(ValueError, match="a client has no examples"):
        FedSVDClient("other", trainer, server.config)


@pytest.mark.parametrize(
    ("settings", "wording"),
    [
        ({"aggregation": "median"}, "aggregation must be one of fedsvd"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1"),
        ({"local_steps": "many"}, "local_steps must be a whole number"),
        ({"subspace": "refresh", "aggregation": "ffa"}, "replaces directions of aggregation='fedsvd'"),
        ({"refresh_directions": 2}, "is read by subspace='refresh' only"),
        ({"init_lora_A": "pissa"}, "init_lora_A must be one of"),
    ],
)
def test_configuration_refuses(settings, wording):
    with pytest.raises(ValueError, match=wording):
        FedSVDConfig(**settings)


def test_saved_state_of_another_federation_is_refused(make_federation, tmp_path):
    server, _, model = make_federation(clients=1)
    server.save(tmp_path)
    with pytest.raises(ValueError, match="aggregation: 'fedsvd' there, 'ffa' here"):
        FedSVDServer(model, FedSVDConfig(aggregation="ffa", rounds=3, local_steps=2)).load(tmp_path)
    (tmp_path / "federation.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read"):
        FedSVDServer(model, server.config).load(tmp_path)
    with pytest.raises(ValueError, match="no federation was saved there"):
        FedSVDServer(model, server.config).load(tmp_path / "elsewhere")


def test_caps_last_to_the_end():
    """Of 6 clients 3 are drawn for 10 rounds with a cap of 5: everybody is needed 5 times, whatever the draw."""
    for seed in range(20):
        left = dict.fromkeys("abcdef", 5)
        for round in range(10):
            chosen = choose_clients(left, 3, 10 - round, Random(f"{seed}/{round}"))
            assert len(chosen) == 3
            for name in chosen:
                left[name] -= 1
        assert set(left.values()) == {0}
