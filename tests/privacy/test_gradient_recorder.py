"""The life of a recorder: what it records, what it refuses, what it leaves behind."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hfnoise.privacy import UncoveredParametersError, UnitGradientRecorder, per_unit_gradients

ROWS = 4


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False))


def inputs(rows=ROWS, positions=6):
    return torch.randn(rows, positions, 3, generator=torch.Generator().manual_seed(1))


def record(recorder, model, batch, unit=None, weight=None, forward=None):
    unit = torch.arange(len(batch)) if unit is None else unit
    weight = torch.ones(len(unit)) if weight is None else weight
    with recorder.record(unit, weight):
        (forward or model)(batch).square().sum().backward()
    return recorder.collect()


def expected(model, batch):
    return per_unit_gradients(model, {"x": batch}, lambda model, batch: model(batch["x"]).square().sum(), mode="loop")


def assert_close(found, wanted, tolerance=1e-6):
    assert list(found) == list(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=tolerance, rtol=tolerance)


def test_names_shapes_and_order():
    model = two_layers()
    with UnitGradientRecorder(model, ROWS) as recorder:
        found = record(recorder, model, inputs())
        assert list(recorder.parameters) == list(found) == ["0.weight", "0.bias", "2.weight"]
        assert all(found[name].shape == (ROWS, *p.shape) for name, p in recorder.parameters.items())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert_close(found, expected(model, inputs()))


@pytest.mark.parametrize("shape", [(ROWS, 3), (ROWS, 1, 3), (ROWS, 6, 3), (ROWS, 2, 3, 3), (ROWS, 2, 1, 2, 3)])
def test_inputs_of_any_number_of_dimensions(shape):
    model, batch = two_layers(), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    with UnitGradientRecorder(model, ROWS) as recorder:
        assert_close(record(recorder, model, batch), expected(model, batch))


@pytest.mark.parametrize("trained", [["0.bias"], ["0.weight"], ["2.weight"], ["0.bias", "2.weight"]])
def test_only_what_trains_is_recorded(trained):
    model = two_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    with UnitGradientRecorder(model, ROWS) as recorder:
        found = record(recorder, model, inputs())
        assert list(found) == trained
        assert_close(found, expected(model, inputs()))


def test_rows_of_a_unit_sum():
    model, batch = two_layers(), inputs()
    rows = expected(model, batch)
    with UnitGradientRecorder(model, 3) as recorder:
        found = record(recorder, model, batch, unit=torch.tensor([2, 0, 2, 2]))
    for name, gradient in rows.items():
        torch.testing.assert_close(
            found[name], torch.stack([gradient[1], 0 * gradient[0], gradient[[0, 2, 3]].sum(0)])
        )


def test_weight_zero_removes_even_nan_and_leaves_other_rows():
    model, batch = two_layers(), inputs()
    rows = expected(model, batch)
    batch[1], batch[2] = math.nan, math.inf
    with UnitGradientRecorder(model, ROWS) as recorder:
        found = record(recorder, model, batch, weight=torch.tensor([1.0, 0.0, 0.0, 2.5]))
        for name, gradient in rows.items():
            assert not found[name][1:3].any()
            torch.testing.assert_close(found[name][[0, 3]], gradient[[0, 3]] * torch.tensor([1, 2.5]).view(2, *[1] * (
                gradient.dim() - 1)))  # fmt: skip
        recorder.reset()
        shared = record(recorder, model, batch, unit=torch.tensor([0, 0, 1, 1]), weight=torch.tensor([1.0, 0, 0, 1]))
        torch.testing.assert_close(shared["2.weight"][:2], rows["2.weight"][[0, 3]])


def test_weights_do_not_touch_what_flows_on():
    model, batch = two_layers(), inputs().requires_grad_()
    with UnitGradientRecorder(model, ROWS) as recorder:
        record(recorder, model, batch, weight=torch.zeros(ROWS))
    weighted = batch.grad
    batch.grad = None
    model(batch).square().sum().backward()
    torch.testing.assert_close(weighted, batch.grad)
    assert batch.grad.abs().min() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    model, batch = two_layers(), inputs().requires_grad_()
    with UnitGradientRecorder(model, ROWS) as recorder:
        plain = record(recorder, model, batch)
        recorder.reset()
        found = record(recorder, model, batch, forward=lambda x: checkpoint(model, x, use_reentrant=reentrant))
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_two_forwards_and_tied_parameters_sum():
    model = two_layers()
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    with UnitGradientRecorder(tied, ROWS) as recorder:
        assert list(recorder.parameters) == ["0.weight", "2.bias"]
        assert_close(record(recorder, tied, inputs()), expected(tied, inputs()))

    def pair(model, batch):
        return (model(batch["x"]) - model(batch["y"])).square().sum((1, 2))

    batch = {"x": inputs(), "y": inputs(positions=1) + 1}
    assert_close(per_unit_gradients(model, batch, pair), per_unit_gradients(model, batch, pair, mode="loop"))


def test_updates_in_place_and_moved_storage_are_seen():
    model, batch = two_layers(), inputs()
    with UnitGradientRecorder(model, ROWS) as recorder:
        record(recorder, model, batch)
        for change in (lambda p: p.data.mul_(0.5), lambda p: setattr(p, "data", p.data * 0.5)):
            recorder.reset()
            for parameter in model.parameters():
                change(parameter)
            assert_close(record(recorder, model, batch), expected(copy.deepcopy(model), batch))


def test_outside_of_a_recording_nothing_is_different():
    model, batch = two_layers(), inputs()
    plain = model(batch)
    with UnitGradientRecorder(model, ROWS) as recorder:
        assert torch.equal(model(batch[:3]), plain[:3]) and model(batch).grad_fn is not None
        with recorder.record(torch.arange(ROWS), torch.ones(ROWS)), torch.no_grad():
            assert torch.equal(model(batch[:3]), plain[:3])  # a reference pass may have other rows


def test_installed_model_is_copied_and_saved_as_the_stock_one():
    model, keys = two_layers(), list(two_layers().state_dict())
    with UnitGradientRecorder(model, ROWS) as recorder:
        twin, file = copy.deepcopy(model), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (twin, torch.load(file, weights_only=False)):
            assert type(other[0]) is nn.Linear and list(other.state_dict()) == keys
            assert other[0].forward.__func__ is nn.Linear.forward and other[0].forward.__self__ is other[0]
            with UnitGradientRecorder(other, ROWS) as second:
                wanted = record(recorder, model, inputs())
                assert_close(record(second, other, inputs()), wanted)
            recorder.reset()
    assert all("forward" not in vars(module) for module in model.modules())


def test_hooks_of_accelerate_stay_around():
    from accelerate.hooks import ModelHook, add_hook_to_module

    calls = []

    class Counted(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    model, wanted = two_layers(), expected(two_layers(), inputs())
    add_hook_to_module(model[0], Counted())
    wrapper, original = model[0].forward, model[0]._old_forward
    with UnitGradientRecorder(model, ROWS) as recorder:
        assert model[0].forward is wrapper
        assert_close(record(recorder, model, inputs()), wanted)
    assert calls == [model[0]] and model[0]._old_forward is original


def test_bypassed_layer_is_refused():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.first(x) @ self.second.weight

    model = Bypass()
    with UnitGradientRecorder(model, ROWS) as recorder, pytest.raises(RuntimeError, match="second.weight got an ord"):
        record(recorder, model, inputs())
    model.second.requires_grad_(False)
    with UnitGradientRecorder(model, ROWS) as recorder:
        record(recorder, model, inputs())  # frozen, it may be used as it likes


def test_idle_layer_is_refused_at_first_and_zero_later():
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    with UnitGradientRecorder(model, ROWS) as recorder:
        with pytest.raises(RuntimeError, match="1.weight, 1.bias got no gradient"):
            record(recorder, model, inputs(), forward=model[0])
        recorder.reset()
        record(recorder, model, inputs(), forward=lambda x: model[0](x) + model[1](x))
        recorder.reset()
        found = record(recorder, model, inputs(), forward=model[0])
        assert found["0.weight"].any() and not found["1.weight"].any()


def test_backward_outside_of_the_recording_is_refused():
    model, batch = two_layers(), inputs()
    with UnitGradientRecorder(model, ROWS) as recorder:
        record(recorder, model, batch)
        recorder.reset()
        with recorder.record(torch.arange(ROWS), torch.ones(ROWS)):
            model(batch)
        model(batch).sum().backward()
        with pytest.raises(RuntimeError, match="backward belongs inside"):
            recorder.collect()


def test_flattened_rows_are_refused():
    model, batch = two_layers(), inputs()
    with UnitGradientRecorder(model, ROWS) as recorder, pytest.raises(ValueError, match="24, 2.*has 4 rows"):
        record(recorder, model, batch, forward=lambda x: model(x.flatten(0, 1)))


def test_changed_trainable_parameters_are_refused():
    model = two_layers()
    with UnitGradientRecorder(model, ROWS) as recorder:
        model[0].requires_grad_(False)
        with pytest.raises(ValueError, match="not those that the recorder was made for"):
            record(recorder, model, inputs())
        model[0].requires_grad_(True)
        with pytest.raises(ValueError, match="already installed"):
            UnitGradientRecorder(model, ROWS)
        with recorder.record(torch.arange(ROWS), torch.ones(ROWS)), pytest.raises(RuntimeError, match="under way"):
            record(recorder, model, inputs())
    UnitGradientRecorder(model, ROWS).close()


@pytest.mark.parametrize(
    ("unit", "weight", "message"),
    [
        (torch.tensor([0, 1, 2, 4]), torch.ones(4), r"\[0, 4\), got 0 to 4"),
        (torch.tensor([-1, 1, 2, 3]), torch.ones(4), "got -1 to 3"),
        (torch.arange(4.0), torch.ones(4), "int64"),
        (torch.arange(4), torch.ones(3), "float32 of shape"),
        (torch.arange(4), torch.ones(4).double(), "float64"),
        (torch.arange(4), torch.tensor([1, 1, 1, math.nan]), "finite"),
    ],
)
def test_bad_rows(unit, weight, message):
    with UnitGradientRecorder(two_layers(), ROWS) as recorder, pytest.raises(ValueError, match=message):
        with recorder.record(unit, weight):
            pass


def test_bad_models():
    with pytest.raises(ValueError, match="float32.*0.weight.*bfloat16"):
        UnitGradientRecorder(two_layers().bfloat16(), ROWS)
    with pytest.raises(ValueError, match="offloaded"):
        UnitGradientRecorder(two_layers().to("meta"), ROWS)
    with pytest.raises(ValueError, match="no trainable"):
        UnitGradientRecorder(two_layers().requires_grad_(False), ROWS)
    with pytest.raises(ValueError, match="at least 1"):
        UnitGradientRecorder(two_layers(), 0)
    model = nn.Sequential(nn.Embedding(4, 3), nn.Conv1d(3, 3, 1), nn.Linear(3, 2))
    with pytest.raises(
        UncoveredParametersError, match='(?s)0.weight: weight of Embedding.*Conv1d.*grad_mode="loop"'
    ) as error:
        UnitGradientRecorder(model, ROWS)
    assert list(error.value.uncovered) == ["0.weight", "1.weight", "1.bias"]
    assert all("forward" not in vars(module) for module in model.modules())
    model = two_layers()
    model[0].forward = lambda x: x
    with pytest.raises(UncoveredParametersError, match="Linear whose forward was replaced"):
        UnitGradientRecorder(model, ROWS)


def test_embedding_tied_to_a_covered_head_is_refused():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(UncoveredParametersError, match="Embedding"):
        UnitGradientRecorder(model, ROWS)
