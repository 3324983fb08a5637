"""Every kind of artefact over the Hub: pushed by the real clients, pulled in a fresh process, equal to the bit."""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The kernels would be compiled in each new home.
QUIET = {"HFNOISE_KERNELS": "0"}
HERE = "tests/hub/test_every_artefact.py::test_pushed_and_pulled"

# What is proven where. Those of HERE are the repositories of tests/hub/artefacts.py.
KINDS = {
    "preference model": "tests/trainers/test_hub_preference.py::test_push_and_pull",
    "preference adapter": "tests/trainers/test_hub_preference.py::test_push_and_pull",
    "LoRA adapter with its DP report": "tests/trainers/test_hub_private.py::test_push_and_pull",
    "federated adapter with its report": "tests/hub/test_broken_trainer_pushes.py::test_trainers",
    "QuEST packed": "tests/trainers/test_hub_qat.py::test_pushed_packed_and_loaded_equal",
    "quest-dense": HERE,
    "quest-unet": HERE,
    "denoiser, and its LoRA": "tests/trainers/test_hub_diffusion.py::test_pushed_and_loaded_by_stock_diffusers",
    "guider": HERE,
    "guided pipeline": "tests/pipelines/test_hub_guided.py::test_pushed_once_and_pulled_by_both",
    "modular pipeline with a guider": "tests/pipelines/test_hub_guided.py::test_pushed_once_and_pulled_by_both",
    "npnet": HERE,
    "NPNet with its pipeline, and an official one": "tests/pipelines/test_hub_golden_noise.py::test_over_the_hub",
    "NoisePromptNet of a Trainer": "tests/trainers/test_noise_prompt_processes.py::test_pushed_and_loaded",
    "oms": HERE,
    "oms-module": HERE,
    "One More Step with its pipeline": "tests/pipelines/test_hub_one_more_step.py::test_over_the_hub",
    "One More Step of a Trainer": "tests/trainers/test_one_more_step_processes.py::test_pushed_with_its_prior",
    "noisy-pairs": HERE,
    "npd": HERE,
    "traces": HERE,
    "adaptive-guidance": HERE,
    "golden-noise": HERE,
    "one-more-step": HERE,
    "projected-guidance": HERE,
    "blocks": HERE,
}


@pytest.mark.parametrize("kind", KINDS)
def test_its_proof_is_a_test_over_the_hub(kind):
    path, _, name = KINDS[kind].partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert name in functions, f"{path} has no {name}"
    assert "run_python" in {argument.arg for argument in functions[name].args.args}  # in fresh processes


@pytest.mark.hub
@pytest.mark.slow
def test_pushed_and_pulled(hub, run_python, tiny_model_path):
    run_python("from tests.hub.artefacts import push; push()", {"MODEL": tiny_model_path, **QUIET})
    found = json.loads(run_python("from tests.hub.artefacts import pull; pull()", QUIET).splitlines()[-1])
    assert found == {kind: True for kind, proof in KINDS.items() if proof == HERE}
    assert hub.unrouted == []
