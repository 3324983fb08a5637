"""Denoisers that are given more than they denoise, scales that move, parts of a schedule: x0, rows, equality."""

import pytest
import torch

from hfnoise.pipelines import AdaptiveGuidance, ProjectedGuidance, guide
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS, images_of
from tests.pipelines.digits_calls import guided
from tests.pipelines.watched_runs import WatchedAdaptive, watched_run

pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS),
    pytest.mark.filterwarnings("ignore:torch.meshgrid"),
]
NAMES = ["svd", "cogvideox-i2v", "cogvideox-dynamic", "flux-kontext", "if-upscaler", "sdxl-base"]


def special(name):
    from tests.pipelines.special_pipelines import SPECIAL

    return SPECIAL[name]


@pytest.mark.parametrize("name", NAMES)
def test_x0_is_the_schedulers(name):
    family = special(name)
    pipe = family.build()
    stock = images_of(pipe(**family.call(2)))
    guider = WatchedAdaptive(threshold=1.0, min_steps=1.0)
    seen, images = watched_run(pipe, family.call(2), guider)
    assert len(seen) == 4 and guider.report.rows == (4,) * 4 and torch.equal(images, stock)
    for number, one in enumerate(seen):
        for mine, output in zip(one.x0, (one.cond, one.uncond), strict=True):
            truth = one.truth(output)
            assert mine.shape == truth.shape
            assert (mine - truth).abs().max() <= 1e-5 * truth.abs().max(), number


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_left_out(name):
    family = special(name)
    pipe = family.build()
    for space in ("x0", "model"):
        guider = AdaptiveGuidance(threshold=1e-6, min_steps=0.0, space=space, at_detection="cond")
        if space == "model" and pipe.scheduler.config.get("prediction_type") == "epsilon":
            continue  # it warns
        with guide(pipe, guider):
            assert images_of(pipe(**family.call(2))).isfinite().all()
        assert guider.report.rows[0] == 4 and guider.report.similarity[0].isfinite().all()
    guider = ProjectedGuidance(norm_threshold=1.0, momentum=-0.5)
    with guide(pipe, guider):
        assert images_of(pipe(**family.call(2))).isfinite().all()
    assert guider.report.rows == (4,) * 4


def test_a_prior():
    from tests.pipelines.special_pipelines import build_prior

    pipe = build_prior()
    call = {"prompt": ["the digit seven", "two"], "num_inference_steps": 4, "output_type": "pt"}

    def run():
        return pipe(**call, generator=torch.Generator().manual_seed(0)).image_embeds

    stock = run()
    with guide(pipe, AdaptiveGuidance(threshold=1.0, min_steps=1.0)):
        assert torch.equal(run(), stock)
    guider = AdaptiveGuidance(threshold=0.01, min_steps=0.0)
    with guide(pipe, guider):
        run()
    assert guider.report.rows == (4, 2, 2, 2)


def test_steps_without_an_unconditional_call():
    """Lumina 2 may truncate guidance at the end of a run: the report has these steps, too."""
    family = FAMILIES["lumina2"]
    pipe = family.build()
    call = {"cfg_trunc_ratio": 0.5}
    stock = images_of(pipe(**family.call(2), **call))
    guider = AdaptiveGuidance(threshold=1.0, min_steps=1.0)
    with guide(pipe, guider):
        assert torch.equal(images_of(pipe(**family.call(2), **call)), stock)
    assert guider.report.rows == (4, 4, 2, 2)


@pytest.mark.parametrize(
    ("name", "arguments", "offset"),
    [
        ("flux", {}, 0),
        ("qwen-image", {}, 0),
        ("wan-2.1", {}, 0),
        ("wan-2.2", {"guidance_scale_2": 2.0}, 0),
        ("cosmos", {}, 1),
        ("hunyuan-video", {}, 0),
        ("sd-instruct-pix2pix", {}, 0),
    ],
)
def test_the_scale_of_the_guider(name, arguments, offset):
    """It goes into the argument that is the guidance scale there: `true_cfg_scale`, or one less in Cosmos."""
    family = FAMILIES[name]
    pipe = family.build()
    call = {**family.call(1), **arguments}
    del call[family.scale_name]
    stock = images_of(pipe(**{**family.call(1), **arguments, family.scale_name: 3.0}))
    with guide(pipe, AdaptiveGuidance(3.0 + offset, space="model", min_steps=1.0, threshold=1.0)):
        assert torch.equal(images_of(pipe(**call)), stock)
    # That of the call counts more.
    stock = images_of(pipe(**{**family.call(1), **arguments}))
    with guide(pipe, AdaptiveGuidance(3.0 + offset, space="model", min_steps=1.0, threshold=1.0)):
        assert torch.equal(images_of(pipe(**{**family.call(1), **arguments})), stock)


def test_without_a_negative_prompt_there_is_nothing_to_guide(caplog):
    """Distilled Flux: it says so, and no report of an earlier call is left."""
    family = FAMILIES["flux-distilled"]
    pipe = family.build()
    stock = images_of(pipe(**family.call(1)))
    guider = AdaptiveGuidance(3.0)
    with guide(pipe, guider):
        assert torch.equal(images_of(pipe(**family.call(1))), stock)
    assert "did not ask for an unconditional prediction" in caplog.text
    with pytest.raises(ValueError, match="has not seen a run yet"):
        _ = guider.report
    # Nor does the default of the pipeline ask for any.
    for options, said in (({}, True), ({"true_cfg_scale": 1.0}, False)):
        caplog.clear()
        with guide(pipe, AdaptiveGuidance()):
            assert torch.equal(images_of(pipe(**family.call(1), **options)), stock)
        assert ("give true_cfg_scale above 1, and a negative prompt" in caplog.text) is said


def test_sixteen_bits(pipe):
    """APG in bfloat16 is that in float32 up to what a model's own rounding does to plain guidance."""
    makers = (lambda: AdaptiveGuidance(threshold=1.0, min_steps=1.0)), (lambda: ProjectedGuidance(momentum=-0.5))
    full = [guided(pipe, make()) for make in makers]
    pipe.to(torch.bfloat16)
    low = [guided(pipe, make()) for make in makers]
    assert low[1].dtype == torch.bfloat16
    plain, projected = (float((a.float() - b).norm() / b.norm()) for a, b in zip(low, full, strict=True))
    assert projected <= 2 * plain, (plain, projected)


@pytest.mark.parametrize(("guider", "said"), [(ProjectedGuidance(space="model"), True), (AdaptiveGuidance(), False)])
def test_apg_where_the_norm_is_brought_back_is_told(guider, said, caplog):
    """Lumina 2 scales the guided prediction to the norm of the conditional one."""
    family = FAMILIES["lumina2"]
    pipe = family.build()
    with guide(pipe, guider):
        pipe(**family.call(1))
    assert ("of APG the direction is left, not the size" in caplog.text) is said
