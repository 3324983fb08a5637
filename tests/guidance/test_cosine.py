"""The cosine test: golden decisions, spaces, precision, what is not finite."""

import pytest
import torch

from hfnoise.guidance import DenoisingPoint, cosine_similarity


def test_spaces_agree_with_the_golden_mixture(guidance_vectors, mixture):
    """cond and uncond are x0; a model sees the state over sqrt(1 + sigma^2), that of a flow over 1 + sigma."""
    vectors = guidance_vectors("gmm_ref")
    x = torch.as_tensor(vectors["x_T"])
    for step in range(mixture.steps):
        cond, uncond = (torch.as_tensor(vectors[name][step]) for name in ("cond", "uncond"))
        sigma = float(mixture.sigmas[step])
        point = DenoisingPoint.from_sigma("sample", sigma)
        measured = {
            space: cosine_similarity(*(point.in_space(space, x * point.alpha, p) for p in (cond, uncond)))
            for space in ("x0", "eps", "v")
        }
        flow = DenoisingPoint.from_sigma("flow_prediction", sigma / (1 + sigma))
        velocities = [(x - p) / sigma - p for p in (cond, uncond)]
        measured["flow"] = cosine_similarity(*(flow.in_space("v", x * flow.alpha, v) for v in velocities))
        torch.testing.assert_close(flow.denoised(x * flow.alpha, velocities[0]), cond)
        for name, cosine in measured.items():
            torch.testing.assert_close(cosine, torch.as_tensor(vectors[f"gamma_{name}"][step]), rtol=0, atol=1e-9)
        x = mixture.step(x, uncond + 7.5 * (cond - uncond), step)
    torch.testing.assert_close(x, torch.as_tensor(vectors["cfg_w7p5"]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("space", "name"), [("x0", "ag_x0_991"), ("eps", "ag_eps_991")])
def test_adaptive_guidance_on_the_golden_mixture(guidance_vectors, mixture, space, name):
    """In eps space the paper's 0.991 stops every sample at its first step: 21 evaluations of 40."""
    vectors = guidance_vectors("gmm_ref")
    y, x = torch.as_tensor(vectors["y"]), torch.as_tensor(vectors["x_T"])
    converged = torch.zeros(len(y), dtype=torch.bool)
    evaluations = torch.zeros(len(y))

    def guide(step, cond, uncond, x):
        point = DenoisingPoint.from_sigma("sample", float(mixture.sigmas[step]))
        cosine = cosine_similarity(*(point.in_space(space, x * point.alpha, p).float() for p in (cond, uncond)))
        guided = torch.where(converged[:, None], cond, uncond + 7.5 * (cond - uncond))
        evaluations.add_(2 - converged.float())
        converged.logical_or_(cosine >= 0.991)
        return guided

    end = mixture.run(x, y, guide)
    torch.testing.assert_close(end, torch.as_tensor(vectors[name]), rtol=1e-9, atol=1e-9)
    assert evaluations.tolist() == vectors[f"{name}_nfe"].tolist()
    assert set(evaluations.tolist()) == ({21.0} if space == "eps" else {30.0, 31.0})


@pytest.mark.parametrize("case", range(3))
def test_decisions_of_the_comfyui_node(guidance_vectors, case):
    """asagi4's node: one cosine over the whole batch, CFG still at the detecting step, and not before a sigma."""
    vectors = {key[3:]: value for key, value in guidance_vectors("ag_asagi4").items() if key.startswith(f"k{case}_")}
    threshold, cfg_start, scale = vectors["params"]
    converged = False
    for step, sigma in enumerate(vectors["sigma"]):
        cond, uncond = (torch.as_tensor(vectors[f"{name}_x0"][step]) for name in ("cond", "uncond"))
        used_cfg = not converged and sigma <= cfg_start
        assert used_cfg == vectors["used_cfg"][step]
        out = uncond + scale * (cond - uncond) if used_cfg else cond
        torch.testing.assert_close(out, torch.as_tensor(vectors["out"][step]), rtol=1e-5, atol=1e-5)
        cosine = cosine_similarity(cond, uncond, per_sample=False)
        assert cosine.shape == (len(cond),) and len(set(cosine.tolist())) == 1
        converged = converged or (used_cfg and bool(cosine[0] >= threshold))


def test_sixteen_bit_predictions_and_autocast():
    """bfloat16 arithmetic rounds 0.9902 to 0.9922, beyond the paper's threshold."""
    generator = torch.Generator().manual_seed(0)
    cond = torch.randn(3, 4, 32, 32, generator=generator)
    uncond = cond + 0.14 * torch.randn(3, 4, 32, 32, generator=generator)
    exact = cosine_similarity(cond.bfloat16().double(), uncond.bfloat16().double())
    assert cosine_similarity(cond.bfloat16(), uncond.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = cosine_similarity(cond.bfloat16(), uncond.bfloat16())
    torch.testing.assert_close(lowered.double(), exact, rtol=0, atol=3e-6)


def test_digits_near_one():
    """1 - gamma = 5e-7 is seen in float32, to 20 %: a quotient of sums is off by as much as it is."""
    generator = torch.Generator().manual_seed(1)
    cond = torch.randn(2, 65536, generator=generator)
    uncond = cond + 1e-3 * torch.randn(2, 65536, generator=generator)
    exact = 1 - cosine_similarity(cond.double(), uncond.double())
    torch.testing.assert_close(1 - cosine_similarity(cond, uncond).double(), exact, rtol=0.2, atol=0)
    assert cosine_similarity(cond, cond).tolist() == [1.0, 1.0]


def test_zero_and_not_finite():
    zeros, ones = torch.zeros(4, 3), torch.ones(4, 3)
    assert cosine_similarity(zeros, zeros).tolist() == [1.0] * 4
    assert cosine_similarity(zeros, ones).tolist() == [0.0] * 4
    assert cosine_similarity(ones * 1e-15, ones * 1e-15).tolist() == [1.0] * 4
    broken = ones.clone()
    broken[1, 0], broken[2, 0] = float("nan"), float("inf")
    cosine = cosine_similarity(broken, ones)
    assert (cosine >= 0.5).tolist() == [True, False, False, True] and cosine[1:3].isnan().all()


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_only_the_direction_counts(scale):
    """Squares of such numbers leave float32: then all predictions would look alike, and guidance would end."""
    cond, uncond = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(cosine_similarity(scale * cond, scale * uncond), cosine_similarity(cond, uncond), atol=1e-6)


def test_a_threshold_of_one_is_never():
    """But for one prediction: 1 - 1e-9 is no number of float32, and 1 is what it rounds to."""
    cond = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    uncond = cond + 1e-5 * torch.randn(2, 4096, generator=torch.Generator().manual_seed(1))
    assert (cosine_similarity(cond, uncond) < 1).all()
    assert cosine_similarity(cond, cond).tolist() == [1.0, 1.0]


def test_nothing_to_compare():
    assert cosine_similarity(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
    assert cosine_similarity(torch.zeros(0, 4), torch.zeros(0, 4), per_sample=False).shape == (0,)


def test_each_sample_on_its_own():
    generator = torch.Generator().manual_seed(2)
    cond, uncond = torch.randn(2, 5, 4, 6, 6, generator=generator)
    alone = torch.cat([cosine_similarity(cond[i : i + 1], uncond[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(cosine_similarity(cond, uncond), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("cond", "uncond", "error", "words"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), ValueError, "one shape"),
        (torch.ones(2), torch.ones(2), ValueError, "beside the batch"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3), TypeError, "int64"),
        ([1.0], torch.ones(2, 3), TypeError, "list"),
    ],
)
def test_bad_input(cond, uncond, error, words):
    with pytest.raises(error, match=words):
        cosine_similarity(cond, uncond)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction", "sample"])
@pytest.mark.parametrize("sigma", [0.9, 0.2])
def test_point_recovers_what_was_mixed(prediction_type, sigma):
    generator = torch.Generator().manual_seed(3)
    image, noise = torch.randn(2, 2, 8, generator=generator, dtype=torch.float64)
    point = DenoisingPoint.from_sigma(prediction_type, sigma)
    model_input = point.alpha * image + point.sigma * noise
    flow = prediction_type == "flow_prediction"
    velocity = noise - image if flow else point.alpha * noise - point.sigma * image
    output = {"epsilon": noise, "v_prediction": velocity, "flow_prediction": velocity, "sample": image}
    for space, truth in (("x0", image), ("eps", noise), ("model", output[prediction_type])):
        torch.testing.assert_close(point.in_space(space, model_input, output[prediction_type]), truth)
    if prediction_type != "sample":
        torch.testing.assert_close(point.in_space("v", model_input, output[prediction_type]), velocity)
    changed = point.denoised(model_input, output[prediction_type] + 1) - image
    torch.testing.assert_close(changed, torch.full_like(changed, point.denoised_per_output))


def test_bad_points():
    with pytest.raises(ValueError, match="one of"):
        DenoisingPoint("eps", 1.0, 0.0)
    with pytest.raises(ValueError, match="finite"):
        DenoisingPoint("epsilon", float("nan"), 0.0)
    with pytest.raises(ValueError, match="both 0"):
        DenoisingPoint("epsilon", 0.0, 0.0)
    with pytest.raises(ValueError, match="no sigma of flow"):
        DenoisingPoint.from_sigma("flow_prediction", 14.6)
    start = DenoisingPoint("epsilon", 0.0, 1.0)
    assert not start.has_denoised
    with pytest.raises(ValueError, match="zero terminal SNR"):
        start.denoised(torch.ones(1, 2), torch.ones(1, 2))
    assert DenoisingPoint("v_prediction", 0.0, 1.0).has_denoised
    with pytest.raises(ValueError, match="one of"):
        start.in_space("latent", torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="no noise"):
        DenoisingPoint("v_prediction", 1.0, 0.0).in_space("eps", torch.ones(1, 2), torch.ones(1, 2))
