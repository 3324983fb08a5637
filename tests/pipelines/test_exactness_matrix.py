"""Every family: guidance that never stops is the stock pipeline, guidance that stops at once the conditional one."""

import pytest
import torch

from hfnoise.pipelines import AdaptiveGuidance, guide
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS, images_of

FAST = ("sd-ddim", "wan-2.1")
pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]
families = pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name, f in FAMILIES.items() if f.guided],
)


def adaptive(threshold, **options):
    return AdaptiveGuidance(threshold=threshold, space="model", **options)


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
    guider = adaptive(1.0)
    assert torch.equal(run(pipe, family.call(2), guider), stock)
    assert guider.report.saved == 0 and set(guider.report.stop_steps) == {None}


class Decided(AdaptiveGuidance):
    """Stops guiding each sample at the step that it is told, whatever the predictions are."""

    def _guided(self):
        return torch.tensor([self._step < stop for stop in self.stops])

    def _observe(self, step):
        pass


def decided(*stops):
    guider = Decided(space="model")
    guider.stops = stops
    return guider


@families
def test_all_converged_is_conditional(name):
    family = FAMILIES[name]
    pipe = family.build()
    conditional = run(pipe, family.conditional_call(2))
    guider = decided(0, 0)
    assert torch.equal(run(pipe, family.call(2), guider), conditional)
    assert set(guider.report.rows) == {2}


@families
def test_mixed_batch_is_the_samples_alone(name):
    family = FAMILIES[name]
    pipe = family.build()
    guider = decided(1, 3)
    together = run(pipe, family.call(2), guider)
    rows = guider.report.rows
    alone = []
    for sample in range(2):
        single = decided(guider.stops[sample])
        alone.append(run(pipe, family.call(1, sample), single))
    alone = torch.cat(alone)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))
    assert rows[0] > rows[1] >= rows[2] > rows[3], rows
