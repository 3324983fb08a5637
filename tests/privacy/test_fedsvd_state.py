"""The invariant A = R^T Q on both sides, the size of the message, and rotations that must be refused."""

import io

import pytest
import torch

from hfnoise.privacy import LoraRotation, StaleRotationError, rotate_lora, rotation_digest, verify_rotation
from hfnoise.privacy.lora_rotation import orthonormality_error

RANK, INPUTS, OUTPUTS = 4, 24, 20


def start(layer="q_proj", seed=0, dtype=torch.float32):
    """Return a server and a client that was sent its rows."""
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(RANK, INPUTS, generator=generator, dtype=dtype)
    server = LoraRotation(layer, lora_A, torch.zeros(OUTPUTS, RANK, dtype=dtype))
    return server, LoraRotation(layer, server.basis_rows, server.lora_B), generator


def train(lora_B, generator):
    """Return B after some local training."""
    return lora_B + torch.randn(lora_B.shape, generator=generator, dtype=lora_B.dtype)


def total(state):
    """Return the update of the weight, in units of B A, with all that was folded."""
    return state.export()[0].dense()


@pytest.mark.parametrize("replaced", [0, 2, 4])
def test_rounds_on_both_sides(replaced):
    server, client, generator = start()
    assert torch.equal(client.basis_rows, server.basis_rows)
    for round in range(1, 21):
        average = train(client.lora_B, generator)
        product = average @ server.lora_A + total(server) - server.lora_B @ server.lora_A
        fold = replaced if round % 5 == 0 else 0
        message = server.advance(average, replaced=fold, seed=round)
        lora_A, lora_B = client.receive(message, round)
        torch.testing.assert_close(total(server), product, atol=5e-6, rtol=2e-6)
        assert torch.equal(lora_A, server.lora_A) and torch.equal(lora_B, server.lora_B)
        assert orthonormality_error(lora_A) < 1e-6
        assert message.floats == message.lora_B.numel() + RANK**2 == OUTPUTS * RANK + RANK**2
        if fold:
            assert not lora_B[:, RANK - fold :].any()
    torch.testing.assert_close(total(client), total(server), atol=0, rtol=0)
    assert len(client.folded) == client.basis == (4 if replaced else 0)
    assert client.export()[0].rank == RANK + len(client.folded) * replaced


def test_a_round_is_the_rotation():
    server, _, generator = start()
    average = train(server.lora_B, generator)
    expected = rotate_lora(server.lora_A, average)
    message = server.advance(average)
    torch.testing.assert_close(server.lora_A, expected.lora_A, atol=1e-6, rtol=0)
    torch.testing.assert_close(server.lora_B, expected.lora_B, atol=1e-6, rtol=0)
    torch.testing.assert_close(message.rotation.double(), expected.rotation, atol=1e-6, rtol=0)


def test_start_keeps_the_product_of_an_imported_adapter():
    generator = torch.Generator().manual_seed(0)
    lora_A, lora_B = torch.randn(3, 9, generator=generator), torch.randn(7, 3, generator=generator)
    state = LoraRotation("q", lora_A, lora_B)
    torch.testing.assert_close(state.lora_B @ state.lora_A, lora_B @ lora_A, atol=5e-6, rtol=1e-6)
    assert orthonormality_error(state.lora_A) < 1e-6


def test_server_restart_and_late_client():
    server, client, generator = start()
    for round in range(3):
        server.advance(train(server.lora_B, generator), replaced=round % 2, seed=round)
    stream = io.BytesIO()
    torch.save(server.state_dict(), stream)  # loads with weights_only=True, as what a stranger sends must
    stream.seek(0)
    saved = torch.load(stream)
    restarted = LoraRotation("q_proj", torch.eye(RANK, INPUTS), torch.zeros(OUTPUTS, RANK))
    restarted.load_state_dict(saved)
    assert restarted.message().digest == server.message().digest
    client.load_state_dict(saved)
    average = train(server.lora_B, generator)
    messages = server.advance(average), restarted.advance(average)
    assert messages[0].digest == messages[1].digest
    torch.testing.assert_close(client.receive(messages[1], 4)[0], server.lora_A, atol=0, rtol=0)
    torch.testing.assert_close(total(client), total(server), atol=0, rtol=0)
    with pytest.raises(ValueError, match="'v_proj', and the state is of 'q_proj'"):
        LoraRotation("v_proj", torch.eye(RANK, INPUTS), torch.zeros(OUTPUTS, RANK)).load_state_dict(saved)


def test_a_message_may_be_sent_again():
    server, client, generator = start()
    client.receive(server.message(), 0)
    message = server.advance(train(server.lora_B, generator), replaced=2, seed=1)
    first, again = client.receive(message), client.receive(server.message())
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True)) and len(client.folded) == 1


def test_stale_and_corrupted_rotations_are_refused():
    server, client, generator = start()
    old = server.advance(train(server.lora_B, generator))
    new = server.advance(train(server.lora_B, generator))
    client.receive(new, 2)
    before = client.lora_A, client.lora_B
    flipped = new.rotation.clone()
    flipped.view(torch.int32)[0, 0] ^= 1
    attempts = {
        "round 1 in round 2: it is stale": (old, 2),
        "holds round 2 already.*of round 1": (old, None),
        "SHA-256 .* instead of .*another round, or was changed": (old._replace(round=2), 2),
        "round 3, has the SHA-256": (new._replace(round=3), 3),
        "rounded to 16 bits": (new._replace(rotation=new.rotation.bfloat16().float()), 2),
        "SHA-256 ": (new._replace(rotation=flipped), 2),
        "of another round, or": (new._replace(rotation=old.rotation), 2),
        "bits flipped": (new._replace(replaced=1), 2),
        "Ask the server for it again": (new._replace(digest="0" * 64), 2),
        "got the rotation of layer 'v_proj'": (start("v_proj")[0].message(), None),
    }
    for message, (sent, round) in attempts.items():
        with pytest.raises(StaleRotationError, match=message):
            client.receive(sent, round)
    assert torch.equal(client.lora_A, before[0]) and torch.equal(client.lora_B, before[1])
    verify_rotation(new, "q_proj", 2)


def test_rotations_of_another_adapter_are_refused():
    server, client, generator = start()
    server.advance(train(server.lora_B, generator), replaced=1, seed=3)
    message = server.advance(train(server.lora_B, generator))
    with pytest.raises(StaleRotationError, match="missed a refresh.*state_dict"):
        client.receive(message)
    narrow = LoraRotation("q_proj", torch.eye(2, INPUTS), torch.zeros(OUTPUTS, 2))
    with pytest.raises(StaleRotationError, match=r"rank 4, and got a rotation of shape \(2, 2\)"):
        client.receive(narrow.message())
    skewed = 2 * torch.eye(RANK)
    message = narrow.message()._replace(
        rotation=skewed, lora_B=torch.zeros(OUTPUTS, RANK), digest=rotation_digest("q_proj", 0, skewed)
    )
    with pytest.raises(StaleRotationError, match="not orthogonal"):
        client.receive(message)


@pytest.mark.parametrize(
    ("average", "options", "error", "message"),
    [
        (torch.zeros(OUTPUTS, RANK).bfloat16(), {}, TypeError, "bfloat16"),
        (torch.zeros(OUTPUTS + 1, RANK), {}, ValueError, r"B of shape \(20, 4\), got \(21, 4\)"),
        (torch.full((OUTPUTS, RANK), float("nan")), {}, ValueError, "80 values that are not finite"),
        (torch.zeros(OUTPUTS, RANK), {"replaced": 5}, ValueError, "between 0 and the rank 4, got 5"),
    ],
)
def test_bad_averages(average, options, error, message):
    server, _, _ = start()
    with pytest.raises(error, match=message):
        server.advance(average, **options)
    assert server.round == 0


def test_digest_covers_everything():
    rotation = torch.eye(3)
    digests = {
        rotation_digest("q", 1, rotation), rotation_digest("q", 2, rotation), rotation_digest("v", 1, rotation),
        rotation_digest("q", 1, -rotation), rotation_digest("q", 1, rotation.double()),
        rotation_digest("q", 1, rotation.reshape(1, 9)), rotation_digest("q", 1, rotation, basis=1),
        rotation_digest("q", 1, rotation, replaced=1), rotation_digest("q", 1, rotation, seed=1),
    }  # fmt: skip
    assert len(digests) == 9
    # Another layout in memory is the same matrix.
    turned = torch.arange(9.0).reshape(3, 3)
    assert rotation_digest("q", 1, turned) == rotation_digest("q", 1, turned.T.contiguous().T)
