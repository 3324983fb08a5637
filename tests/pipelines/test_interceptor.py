"""The parts of the interceptor by themselves: calls of a module, the schedule of a run, what is denoised, outputs."""

import threading

import pytest
import torch

from hfnoise.pipelines.model_inputs import predicted_part
from hfnoise.pipelines.model_outputs import prediction_of, with_prediction
from hfnoise.pipelines.module_calls import intercepted, is_compiled, watched_method
from hfnoise.pipelines.run_schedule import RunSchedule

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def ddim(steps=10, **settings):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing="trailing", **settings)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize(
    ("count", "given", "first"),
    [
        (10, None, 999),
        (4, 399, 399),  # image to image
        (4, 999, 999),  # denoising_end of SDXL
        (4, 699, 699),  # both, in the middle
        (None, 399, 399),  # a pipeline that does not say how many
        (None, None, 999),
        (4, torch.tensor([0.399] * 2, dtype=torch.bfloat16), 399),  # Flux: thousandths, a row each, 16 bits
        (4, torch.tensor([0.999], dtype=torch.bfloat16), 999),
        (4, 0.123, 399),  # no timestep of this scheduler
    ],
)
def test_where_a_run_begins(count, given, first):
    run = RunSchedule(ddim(), count, given)
    assert int(run.timestep(0)) == first
    assert run.count == (count or {399: 4, 999: 10}[first])
    assert run.timestep(0).device.type == "cpu"
    with pytest.raises(ValueError, match="past the end of the 10 timesteps"):
        run.timestep(10)


def test_a_run_of_a_solver_with_two_evaluations():
    """Every timestep but the first is there twice; at image to image the second of them is the first of a step."""
    from diffusers import HeunDiscreteScheduler

    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    tail = scheduler.timesteps[4:]
    run = RunSchedule(scheduler, len(tail), tail[0])
    assert [float(run.timestep(n)) for n in range(len(tail))] == tail.tolist()


@pytest.mark.parametrize(
    ("given", "found", "latents", "part"),
    [
        ((2, 4, 8, 8), (2, 4, 8, 8), (2, 4, 8, 8), (2, 4, 8, 8)),
        ((2, 9, 8, 8), (2, 4, 8, 8), (2, 4, 8, 8), (2, 4, 8, 8)),
        ((2, 4, 8, 8), (2, 8, 8, 8), None, (2, 4, 8, 8)),
        ((2, 3, 8, 8, 8), (2, 3, 4, 8, 8), (2, 3, 4, 8, 8), (2, 3, 4, 8, 8)),
        ((2, 3, 8, 8, 33), (2, 3, 8, 8, 16), None, (2, 3, 8, 8, 16)),
        ((2, 6, 8, 8), (2, 6, 8, 8), (2, 3, 8, 8), (2, 3, 8, 8)),
        ((2, 32, 16), (2, 32, 16), (2, 20, 16), (2, 20, 16)),
        # Frames and channels in another order: nothing is to be cut.
        ((2, 4, 3, 8, 8), (2, 4, 3, 8, 8), (2, 3, 4, 8, 8), (2, 4, 3, 8, 8)),
    ],
)
def test_what_is_denoised(given, found, latents, part):
    latents = None if latents is None else torch.Size(latents)
    index = predicted_part(torch.zeros(given), torch.zeros(found), latents)
    assert torch.zeros(given)[index].shape == torch.zeros(found)[index].shape == torch.Size(part)


@pytest.mark.parametrize(("given", "found"), [((2, 4, 8, 8), (2, 5, 9, 8)), ((2, 4, 8), (2, 4)), ((2, 4), (1, 4))])
def test_shapes_that_have_nothing_in_common(given, found):
    with pytest.raises(ValueError, match="x0 does not follow"):
        predicted_part(torch.zeros(given), torch.zeros(found))


def test_outputs_of_priors():
    from diffusers.models.transformers.prior_transformer import PriorTransformerOutput

    output = PriorTransformerOutput(predicted_image_embedding=torch.ones(2, 4))
    changed = with_prediction(output, 2 * prediction_of(output))
    assert isinstance(changed, PriorTransformerOutput) and changed.predicted_image_embedding.sum() == 16
    with pytest.raises(TypeError, match="one tensor is expected"):
        prediction_of((torch.ones(1), torch.ones(1)))
    with pytest.raises(TypeError, match="one tensor is expected"):
        prediction_of([[torch.ones(1)]])


class Contexts(torch.nn.Module):
    """A denoiser that announces its calls, as the transformers of diffusers do."""

    def __init__(self):
        super().__init__()
        self.entered = []

    def forward(self, x):
        return x

    def cache_context(self, name):
        from contextlib import nullcontext

        self.entered.append(name)
        return nullcontext(name)


def test_contexts_are_told_and_what_was_on_the_instance_is_put_back():
    module, told = Contexts(), []
    own = lambda name: Contexts.cache_context(module, name)  # noqa: E731
    module.__dict__["cache_context"] = own
    with intercepted(module, lambda call, args, kwargs: call(*args, **kwargs), told.append):
        with module.cache_context("cond") as value:
            assert value == "cond"
        with pytest.raises(RuntimeError, match="in the middle of a guided call"):
            with intercepted(module, None):
                raise AssertionError("it was taken")
    assert told == module.entered == ["cond"] and module.__dict__["cache_context"] is own

    with watched_method(module, "cache_context", told.append):
        module.cache_context("uncond")
    assert len(told) == 2 and module.__dict__["cache_context"] is own


def test_hooks_and_a_forward_of_ones_own_stay_in_place():
    """accelerate puts another forward on the instance, in the middle of the block, too."""
    module = torch.nn.Identity()
    module.register_forward_hook(lambda module, args, output: output + 1)
    with intercepted(module, lambda call, args, kwargs: 10 * call(*args, **kwargs)):
        assert module(1) == 20
        module.forward = lambda x: x + 5
        assert module(1) == 70
    assert module(1) == 7


def test_ways_of_compiling():
    plain, in_place, forward, block = (torch.nn.Sequential(torch.nn.Identity()) for _ in range(4))
    in_place.compile(backend="eager")
    forward.forward = torch.compile(forward.forward, backend="eager")
    block[0].compile(backend="eager")
    whole = torch.compile(torch.nn.Identity(), backend="eager")
    assert [is_compiled(m) for m in (plain, in_place, forward, block, whole)] == [False, True, True, True, True]
    # Being watched is not being compiled.
    with intercepted(plain, lambda call, args, kwargs: call(*args, **kwargs)):
        assert not is_compiled(plain)


def test_one_run_at_a_time_gets_the_module():
    """Of many threads that want it at once."""
    module, barrier, taken = torch.nn.Identity(), threading.Barrier(8), []

    def want():
        barrier.wait(10)
        try:
            with intercepted(module, lambda call, args, kwargs: call(*args, **kwargs)):
                taken.append(True)
                barrier.wait(10)
        except RuntimeError:
            taken.append(False)
            barrier.wait(10)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sum(taken) == 1 and len(taken) == 8
    assert "_compiled_call_impl" not in module.__dict__
