"""Every family: guidance that never stops is the stock pipeline, guidance that stops at once the conditional one."""

import pytest
import torch

from hfnoise.benchmarks.guidance_exactness import forced_stops
from hfnoise.pipelines import AdaptiveGuidance, guide
from hfnoise.pipelines.pipeline_layouts import layout_of
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS, images_of

FAST = ("sd-ddim", "wan-2.1")
pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]
families = pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name, f in FAMILIES.items() if f.guided],
)


def run(pipe, call, guider=None):
    if guider is None:
        return images_of(pipe(**call))
    with guide(pipe, guider):
        return images_of(pipe(**call))


@families
def test_never_triggered_is_stock(name):
    family = FAMILIES[name]
    pipe = family.build()
    stock = run(pipe, family.call(2))
    guider = AdaptiveGuidance(threshold=1.0, space="x0" if layout_of(type(pipe)).x0_from_scheduler else "model")
    assert torch.equal(run(pipe, family.call(2), guider), stock)
    assert guider.report.saved == 0 and set(guider.report.stop_steps) == {None}


@families
def test_all_converged_is_conditional(name):
    family = FAMILIES[name]
    pipe = family.build()
    conditional = run(pipe, family.conditional_call(2))
    guider = forced_stops(0, 0)
    assert torch.equal(run(pipe, family.call(2), guider), conditional)
    assert set(guider.report.rows) == {2}


@families
def test_mixed_batch_is_the_samples_alone(name):
    family = FAMILIES[name]
    pipe = family.build()
    guider = forced_stops(1, 3)
    together = run(pipe, family.call(2), guider)
    rows = guider.report.rows
    alone = []
    for sample in range(2):
        single = forced_stops(guider.stops[sample])
        alone.append(run(pipe, family.call(1, sample), single))
    alone = torch.cat(alone)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))
    assert rows[0] > rows[1] >= rows[2] > rows[3], rows
