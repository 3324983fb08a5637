"""Inputs quantised once for all layers that read them, and weights once between two steps of an optimizer."""

import copy
import gc
import weakref

import numpy
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hfnoise import QuestConfig, export_packed, prepare_qat
from hfnoise.quantization import LinearQuantization, QuestLinear, activation_sharing, cached_weights, linear
from hfnoise.quantization.weight_cache import forget_quantized_weights
from tests.quantization.tiny_models import TOKENS, llama, logits


@pytest.fixture
def counted(monkeypatch):
    """Return the numbers of entries of the inputs and of the weights that were quantised, as lists that grow."""
    found = {"inputs": [], "weights": []}

    def counting(kind, function):
        def counted(x, *settings):
            found[kind].append(x.numel())
            return function(x, *settings)

        return counted

    monkeypatch.setattr(activation_sharing, "_quantized", counting("inputs", activation_sharing._quantized))
    monkeypatch.setattr(linear, "quantized_rows", counting("weights", linear.quantized_rows))
    return found


def model_of(bits=4, **changes):
    return prepare_qat(llama(**changes), QuestConfig(bits=bits))


def gradients(model, **options):
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_inputs_are_quantized_once(counted, monkeypatch):
    model = model_of().train()
    shared = gradients(model)
    # Of each of two blocks: attention in, attention out, MLP in, MLP down; not 7.
    assert len(counted["inputs"]) == 2 * 4
    assert len(counted["weights"]) == 2 * 7
    plain = activation_sharing._quantized
    monkeypatch.setattr(linear, "quantized_activation", plain)
    counted["inputs"].clear()
    unshared = gradients(model)
    assert len(counted["inputs"]) == 2 * 7
    assert shared.keys() == unshared.keys()
    for name, gradient in shared.items():
        # The sum of three rotated gradients, or the rotation of their sum: float32 rounding.
        torch.testing.assert_close(gradient, unshared[name], rtol=1e-4, atol=1e-5, msg=name)


def test_nothing_is_kept_alive():
    layer = QuestLinear(64, 8, quantization=LinearQuantization(4, 4))
    kept = []
    gc.disable()  # by reference counts alone, as memory of a GPU is freed
    try:
        for grad in (False, True):
            x = torch.randn(4, 64) * (torch.ones((), requires_grad=True) if grad else 1)
            y = layer(x)
            points = activation_sharing._known[x][1][0]
            kept += [weakref.ref(x), weakref.ref(points)]
            if grad:
                y.sum().backward()
            del x, y, points
            assert [reference() for reference in kept] == [None] * len(kept), f"grad={grad}"
    finally:
        gc.enable()


def test_changes_in_place_are_seen():
    layer = QuestLinear(64, 8, quantization=LinearQuantization(4, 4))
    with torch.no_grad():
        x = torch.randn(4, 64)
        layer(x)
        x.neg_()
        assert torch.equal(layer(x), layer(x.clone()))
    x = torch.randn(4, 64)
    first = layer(x.mul_(2))
    assert torch.equal(first, layer(x.clone()))
    with torch.no_grad():
        layer(x)
    assert layer(x).requires_grad


def test_copies_and_files_carry_nothing(tmp_path):
    layer = QuestLinear(64, 8, quantization=LinearQuantization(4, 4))
    with torch.no_grad():
        x = torch.randn(4, 64).neg_().neg_()
        layer(x)
        y = copy.deepcopy(x)
        y.add_(1)
        assert y._version == x._version  # so that counters alone would not tell
        assert torch.equal(layer(y), layer(y.clone()))
    assert vars(x) == {}
    torch.save(x, tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True), x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = model_of(2).train()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    checkpointed = gradients(model, use_cache=False)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_of_layers_that_share(reentrant):
    layers = [QuestLinear(64, 8, quantization=LinearQuantization(2, 2)) for _ in range(3)]

    def block(x):
        x = x * 2
        return sum(layer(x) for layer in layers)

    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        run(x).square().sum().backward()
        results.append([x.grad, *(layer.weight.grad.clone() for layer in layers)])
        for layer in layers:
            layer.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_checkpointed_blocks_that_read_one_tensor():
    """As cross-attention reads the encoder's output in every block, and post-norm models their block's input."""
    layers = [QuestLinear(64, 8, quantization=LinearQuantization(2, 2)) for _ in range(4)]
    results = []
    for run in (lambda block, x: block(x), lambda block, x: checkpoint(block, x, use_reentrant=False)):
        leaf = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        x = leaf * 2
        blocks = [lambda x, pair=pair: pair[0](x) + pair[1](x) for pair in (layers[:2], layers[2:])]
        sum(run(block, x) for block in blocks).square().sum().backward()
        results.append([leaf.grad, *(layer.weight.grad.clone() for layer in layers)])
        for layer in layers:
            layer.zero_grad()
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_a_second_gradient_of_one_input():
    layer = QuestLinear(64, 8, quantization=LinearQuantization(2, 2))
    x = torch.randn(4, 64, requires_grad=True) * 2
    first, second = (torch.autograd.grad(layer(x).sum(), x)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_memory_that_numpy_writes():
    layer, values = QuestLinear(64, 8, quantization=LinearQuantization(4, 4)), numpy.ones((2, 64), dtype="float32")
    x = torch.from_numpy(values)
    with torch.no_grad():
        layer(x)
        values[:, ::3] = -3  # counted by nobody
        assert torch.equal(layer(x), layer(x.clone()))


def test_accumulation_in_cached_weights_is_equal(counted):
    model = model_of().train()
    expected = gradients(model)
    counted["weights"].clear()
    with cached_weights(model):
        for _ in range(3):
            found = gradients(model)
            assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert all(layer.quantized_cache is not None for layer in layers(model))
    assert len(counted["weights"]) == 2 * 7
    assert all(layer.quantized_cache is None for layer in layers(model))  # 6 bytes an entry are free again


def test_weights_alone_are_quantized_once(monkeypatch):
    calls = []
    plain = linear.float_weight
    monkeypatch.setattr(linear, "float_weight", lambda *given: calls.append(1) or plain(*given))
    model = prepare_qat(llama(), QuestConfig(weight_bits=2))
    expected = logits(model)
    calls.clear()
    with cached_weights(model):
        assert torch.equal(logits(model), expected) and torch.equal(logits(model), expected)
        assert len(calls) == 2 * 7
        first, second = gradients(model), gradients(model)
        assert all(torch.equal(first[name], second[name]) for name in first)
        changed_by_fused_adamw(model)
        assert not torch.equal(logits(model), expected)


def layers(model):
    return [module for module in model.modules() if isinstance(module, QuestLinear)]


def changed_by_fused_adamw(model):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()


def changed_by_load(assign):
    def change(model):
        for sign in (-1, 1):  # twice: from the second time on every weight is as new as the one before
            logits(model)
            state = {name: sign * value.clone().flip(0) for name, value in model.state_dict().items()}
            model.load_state_dict(state, assign=assign)

    return change


def changed_by_data(model):
    for parameter in model.parameters():
        parameter.data.neg_()
    forget_quantized_weights()


CHANGES = {
    "fused AdamW": changed_by_fused_adamw,
    "load_state_dict": changed_by_load(False),
    "load_state_dict assign": changed_by_load(True),
    "data, forget_quantized_weights": changed_by_data,
}


@pytest.mark.parametrize("change", CHANGES)
def test_cached_weights_are_dropped_when_weights_change(change):
    model = model_of()
    with cached_weights():
        before = logits(model)
        CHANGES[change](model)
        after = logits(model)
    assert not torch.equal(before, after)
    assert torch.equal(after, logits(model))


def test_packed_weights_in_the_cache():
    model = export_packed(model_of())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = logits(model)
    other = prepare_qat(llama(initializer_range=0.1), QuestConfig(bits=4))
    for layer in layers(other):
        layer.weight.data = layer.weight.data.flip(0, 1)  # other codes
    export_packed(other)
    with cached_weights(model):
        assert torch.equal(logits(model), before)
        model.load_state_dict(other.state_dict())
        assert torch.equal(logits(model), logits(other))
        model.load_state_dict(state)
        assert torch.equal(logits(model), before)


def test_inference_tensors():
    with torch.inference_mode():
        model = model_of()
        with cached_weights(model):
            assert torch.equal(logits(model), logits(model))
        export_packed(model)
        with cached_weights(model):
            assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("settings", [{"bits": 2}, {"weight_bits": 2}])
def test_training_after_inference_mode(settings):
    """As a callback that generates a sample in mid-run."""
    model = prepare_qat(llama(), QuestConfig(**settings))
    expected = gradients(model)
    with cached_weights(model):
        with torch.inference_mode():
            logits(model)
        found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mark", ["device_mesh", "ds_id", "_is_flat_param"])
def test_cache_refuses_sharded_weights(mark):
    layer = QuestLinear(8, 8)
    setattr(layer.weight, mark, 1)
    with pytest.raises(ValueError, match="weight is sharded"), cached_weights(layer):
        pass
