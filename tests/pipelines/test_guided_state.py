"""What a guided call leaves behind, and who may be in one at the same time: exceptions, threads, copies, memory."""

import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hfnoise.pipelines import AdaptiveGuidance, LinearGuidance, ProjectedGuidance, guide, guided_class
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS
from tests.pipelines.digits_calls import guided, never, run

pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]
slow = pytest.mark.slow


def left_on(pipe):
    own = [(name, frozenset(module.__dict__)) for name, module in pipe.unet.named_modules()]
    return frozenset(pipe.__dict__) - {"_num_timesteps", "_guidance_scale"}, own


def fails_at(number, error):
    def callback(pipe, step, timestep, values):
        if step == number:
            raise error
        return values

    return callback


@slow
@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_nothing_is_left_after_an_exception(pipe, error):
    expected = run(pipe, callback_on_step_end=lambda pipe, step, timestep, values: values)
    before = left_on(pipe)
    guider = AdaptiveGuidance(threshold=0.01, inner=ProjectedGuidance(momentum=-0.5))
    with pytest.raises(type(error)):
        guided(pipe, guider, callback_on_step_end=fails_at(2, error))
    assert left_on(pipe) == before
    assert torch.equal(run(pipe), expected) and torch.equal(guided(pipe, never()), expected)
    assert guided(pipe, guider).shape == expected.shape and len(guider.report.rows) == 4


def test_a_second_call_in_mid_run_is_refused_and_the_first_goes_on(pipe):
    """With the same guider, another one, and another pipeline of the same model."""
    other = copy.copy(pipe)
    first = AdaptiveGuidance(threshold=0.01, min_steps=0.0)
    expected = guided(pipe, first)
    refused = []

    def again(pipe, step, timestep, values):
        for target, guider in ((pipe, None), (other, never()), (other, first)):
            with pytest.raises(RuntimeError, match="in the middle of a guided call"):
                if guider is None:
                    run(target)
                else:
                    guided(target, guider)
            refused.append(step)
        return values

    assert torch.equal(guided(pipe, first, callback_on_step_end=again), expected)
    assert first.report.rows == (4, 2, 2, 2) and len(refused) == 12
    assert torch.equal(guided(other, never()), run(pipe))


@slow
def test_a_stock_pipeline_of_the_same_model_in_a_callback(pipe):
    """A preview, say: its evaluations are no steps of the guided run."""
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    expected, found = run(other), []

    def preview(pipe, step, timestep, values):
        found.append(run(other))
        return values

    guider = AdaptiveGuidance(threshold=0.01, min_steps=0.0)
    alone = guided(pipe, guider)
    assert torch.equal(guided(pipe, guider, callback_on_step_end=preview), alone)
    assert guider.report.rows == (4, 2, 2, 2)
    assert len(found) == 4 and all(torch.equal(images, expected) for images in found)


# Threads and copies. ------------------------------------------------------------------------------------------------


def in_thread(call):
    found = []

    def target():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found.append(call())
            except Exception as error:
                found.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(60)
    return found[0]


@slow
def test_threads_that_share_a_unet(pipe):
    """A stock pipeline in another thread is untouched; a guided one is refused, with its guider or another's."""
    other, third = copy.copy(pipe), copy.copy(pipe)
    # A scheduler is a pipeline's own.
    other.scheduler, third.scheduler = copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.scheduler)
    expected = run(pipe)
    found = []

    def meanwhile(pipe, step, timestep, values):
        found.append((in_thread(lambda: run(other)), in_thread(lambda: guided(third, never()))))
        return values

    guider = AdaptiveGuidance(threshold=0.01, min_steps=0.0)
    alone = guided(pipe, guider)
    assert torch.equal(guided(pipe, guider, callback_on_step_end=meanwhile), alone)
    for stock_images, error in found:
        assert torch.equal(stock_images, expected)
        assert isinstance(error, RuntimeError) and "in the middle of a guided call" in str(error)


@slow
def test_two_pipelines_at_once_and_one_guider(pipe):
    """Each with its own guider they do not see each other; one guider for both is refused, not mixed up."""
    other = copy.deepcopy(pipe)
    mine, theirs = never(), AdaptiveGuidance(threshold=0.01, min_steps=0.0)
    expected = run(pipe), guided(other, theirs)
    found = []

    def meanwhile(pipe, step, timestep, values):
        found.append((in_thread(lambda: guided(other, theirs)), in_thread(lambda: guided(other, mine))))
        return values

    assert torch.equal(guided(pipe, mine, callback_on_step_end=meanwhile), expected[0])
    for images, error in found:
        assert torch.equal(images, expected[1]) and isinstance(error, RuntimeError)
    assert mine.report.rows == (4,) * 4
    # What is inside of a guider has a state too.
    shared = ProjectedGuidance(momentum=-0.5)
    outer, second = AdaptiveGuidance(inner=shared), AdaptiveGuidance(inner=shared)
    found.clear()

    def inside(pipe, step, timestep, values):
        found.append(in_thread(lambda: guided(other, second)))
        return values

    guided(pipe, outer, callback_on_step_end=inside)
    assert all(isinstance(error, RuntimeError) for error in found)


@slow
def test_copies_and_pickles(pipe):
    made = guided_class(type(pipe)).from_pipe(pipe, guider=AdaptiveGuidance(threshold=0.01, min_steps=0.0))
    expected = run(made)
    copied = copy.deepcopy(made)
    assert copied.guider is not made.guider and copied.unet is not made.unet
    assert torch.equal(run(copied), expected)
    loaded = pickle.loads(pickle.dumps(made))
    assert type(loaded) is type(made) and torch.equal(run(loaded), expected)
    assert pickle.loads(pickle.dumps(type(made))) is type(made)


# What is kept. ----------------------------------------------------------------------------------------------------


def tensors_of(value, found, seen):
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        found.append(value)
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for entry in [*entries, *getattr(value, "__dict__", {}).values()]:
        tensors_of(entry, found, seen)


def test_a_guider_keeps_the_trace_and_no_predictions(pipe):
    for guider in (
        AdaptiveGuidance(inner=LinearGuidance(inner=ProjectedGuidance(momentum=-0.5))),
        ProjectedGuidance(momentum=-0.5),
        LinearGuidance(),
    ):
        guided(pipe, guider)
        found = []
        tensors_of(guider, found, set())
        assert max(tensor.numel() for tensor in found) <= 2
        assert guider._source is None


def test_a_pipeline_dies_with_its_last_reference(pipe):
    made = guided_class(type(pipe)).from_pipe(copy.deepcopy(pipe), guider=ProjectedGuidance(momentum=-0.5))
    run(made)
    dead = weakref.ref(made.unet)
    gc.disable()
    try:
        guider = made.guider
        del made
        # UNets hold no cycles of their own, and the pipeline none either.
        assert dead() is None
    finally:
        gc.enable()
    assert len(guider.report.rows) == 4


@slow
def test_a_report_is_of_the_last_call(pipe):
    guider = never()
    guided(pipe, guider)
    with pytest.raises(RuntimeError):
        guided(pipe, guider, callback_on_step_end=fails_at(1, RuntimeError("mine")))
    assert len(guider.report.rows) == 2


class Transfers(TorchDispatchMode):
    """Counts what an accelerator would have to be waited for: numbers, and masks that are counted."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero")
        return function(*args, **(kwargs or {}))


@slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaptiveGuidance(threshold=0.9999, inner=ProjectedGuidance(norm_threshold=1.0, momentum=-0.5)),
        lambda: AdaptiveGuidance(threshold=0.9999, inner=LinearGuidance()),
        lambda: ProjectedGuidance(momentum=-0.5),
    ],
)
@pytest.mark.parametrize("name", ["sd-euler", "sd3", "flux"])
def test_one_transfer_from_the_device_in_a_step(name, make):
    """The mask of the samples that are guided; sigmas and timesteps are read once for a run."""
    family = FAMILIES[name]
    pipe = family.build()

    def transfers(steps, guider):
        with guide(pipe, guider), Transfers() as seen:
            pipe(**{**family.call(2), "num_inference_steps": steps})
        return seen.count

    per_step = [(transfers(16, guider) - transfers(8, guider)) / 8 for guider in (None, make())]
    assert per_step[1] - per_step[0] <= 1


@slow
def test_a_pipeline_that_calls_its_guider_leaves_no_predictions_in_it():
    """HunyuanImage and its like; while it runs, the guider is taken."""
    from hfnoise import AutoGuidedPipeline
    from tests.pipelines.tiny_native import native_call, native_pipeline

    guider = ProjectedGuidance(4.0, momentum=-0.5)
    pipe = AutoGuidedPipeline.from_pipe(native_pipeline(), guider=guider)
    pipe.set_progress_bar_config(disable=True)
    pipe(**native_call())
    found = []
    tensors_of({name: value for name, value in vars(guider).items() if name != "_source"}, found, set())
    assert max(tensor.numel() for tensor in found) <= 2 and guider._source is None
    assert len(guider.report.rows) == 4
