"""Guided calls of compiled denoisers: the same images, two shapes at most, and compiled as before after the call."""

import pytest
import torch

from hfnoise.benchmarks.guidance_exactness import forced_stops
from hfnoise.pipelines import guide
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS, images_of

pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Counted:
    """A backend that runs what it is given, and counts the graphs: inductor takes half a minute for one of them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Batched, and quickly traced; UNets take ten times as long.
BATCHED = "pixart-alpha"


def run(pipe, name, guider=None, **arguments):
    call = {**FAMILIES[name].call(2), **arguments}
    if guider is None:
        return images_of(pipe(**call))
    with guide(pipe, guider):
        return images_of(pipe(**call))


def compile_in(way, pipe, backend):
    """Compile the denoiser in one of the ways that are used."""
    if way == "module":
        pipe.transformer = torch.compile(pipe.transformer, backend=backend, dynamic=False)
    else:
        pipe.transformer.compile(backend=backend, dynamic=False, fullgraph=True)


@pytest.mark.parametrize("way", ["module", "in place"])
def test_compiled_is_eager(way):
    """Whole batches only: with one sample converged a third number of rows would be compiled."""
    pipe = FAMILIES[BATCHED].build()
    eager, one = run(pipe, BATCHED), run(pipe, BATCHED, forced_stops(1, 3))
    backend = Counted()
    compile_in(way, pipe, backend)
    model, before = pipe.transformer, dict(pipe.transformer.__dict__)
    guider = forced_stops(1, 3)
    torch.testing.assert_close(run(pipe, BATCHED, guider), one, rtol=1e-4, atol=1e-4)
    assert guider.report.rows == (4, 4, 4, 2)
    assert backend.graphs == 2
    assert pipe.transformer is model and dict(model.__dict__) == before

    def fail(step, timestep, latents):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, BATCHED, forced_stops(0, 0), callback=fail)
    assert dict(model.__dict__) == before
    # Not another graph for other decisions, nor for the stock pipeline.
    run(pipe, BATCHED, forced_stops(0, 4))
    torch.testing.assert_close(run(pipe, BATCHED), eager, rtol=1e-4, atol=1e-4)
    assert backend.graphs == 2


@pytest.mark.parametrize("name", ["ltx", "flux"])
def test_repeated_blocks(name):
    """Batched (LTX) and two calls (Flux): there a sample less would be another shape, too."""
    pipe = FAMILIES[name].build()
    expected = run(pipe, name, forced_stops(1, 3))
    backend = Counted()
    pipe.transformer.compile_repeated_blocks(backend=backend, dynamic=False)
    guider = forced_stops(1, 3)
    torch.testing.assert_close(run(pipe, name, guider), expected, rtol=1e-4, atol=1e-4)
    assert guider.report.rows == (4, 4, 4, 2)
    # Two shapes of one kind of block, one shape of two kinds.
    assert backend.graphs == 2
