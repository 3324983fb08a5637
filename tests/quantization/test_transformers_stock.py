"""What stock transformers, with no hfnoise installed, does with our checkpoints; and the way over a Hub."""

import json
import os
import subprocess
import sys

import pytest
import torch

from hfnoise import QuestConfig, dequantize, export_packed, prepare_qat
from tests.quantization.tiny_models import TOKENS, gpt2, llama, logits

WIDTHS = [1, 1.58, 2, 3, 4, 8]

STOCK = """
import json, os, sys, torch

sys.modules["hfnoise"] = None  # whoever imports it fails, also where it is installed
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

found = {}
for folder in sorted(os.listdir()):
    try:
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(12).reshape(2, 6)).logits
        save_file({"logits": logits.contiguous()}, f"{folder}/logits.safetensors")
        found[folder] = "loaded"
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
assert not [name for name in sys.modules if name.startswith("hfnoise.")]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_stock_transformers(tmp_path):
    from safetensors.torch import load_file

    expected = {}
    for bits in WIDTHS:
        for name, build in (("llama", llama), ("gpt2", gpt2)):
            model = export_packed(prepare_qat(build(), QuestConfig(weight_bits=bits)))
            model.save_pretrained(tmp_path / f"packed-{name}-{bits}")
            expected[f"dense-{name}-{bits}"] = logits(model)
            dequantize(model).save_pretrained(tmp_path / f"dense-{name}-{bits}")
    master = prepare_qat(llama(), QuestConfig(weight_bits=2))
    master.save_pretrained(tmp_path / "master")

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", STOCK], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4 * len(WIDTHS) + 1
    for name, result in found.items():
        if name.startswith("packed"):
            assert "ignore_mismatched_sizes" in result, f"{name}: {result}"
            continue
        assert result == "loaded", f"{name}: {result}"
        if name.startswith("dense"):
            assert torch.equal(load_file(tmp_path / name / "logits.safetensors")["logits"], expected[name]), name
    # Master weights are floats under stock names: stock code runs them unquantised (the card says so).
    stock = load_file(tmp_path / "master" / "logits.safetensors")["logits"]
    assert torch.equal(stock, logits(llama())) and not torch.equal(stock, logits(master))


PUSH = """
import json, os, torch
from hfnoise import QuestConfig, export_packed, prepare_qat
from tests.quantization.tiny_models import llama, logits, train

found = {}
for bits in json.loads(os.environ["BITS"]):
    model = export_packed(train(prepare_qat(llama(), QuestConfig(bits=bits))))
    model.push_to_hub(f"tiny-{bits}")
    found[bits] = logits(model).tolist()
print(json.dumps(found))
"""

PULL = """
import json, os
import hfnoise
from transformers import AutoModelForCausalLM
from tests.quantization.tiny_models import logits, quantized

found = {}
for bits in json.loads(os.environ["BITS"]):
    model = AutoModelForCausalLM.from_pretrained(f"tester/tiny-{bits}")
    assert type(model.get_submodule(quantized(model)[0])).__name__ == "QuestPackedLinear"
    found[bits] = logits(model).tolist()
print(json.dumps(found))
"""


@pytest.mark.hub
@pytest.mark.slow
def test_push_and_pull(hub, run_python):
    environment = {"BITS": json.dumps(WIDTHS)}
    pushed, pulled = (json.loads(run_python(code, environment).splitlines()[-1]) for code in (PUSH, PULL))
    assert pushed == pulled and len(pulled) == len(WIDTHS)
    assert torch.tensor(pulled["1"]).shape[:2] == TOKENS.shape
    assert {"config.json", "model.safetensors"} <= set(hub.files("tester/tiny-1.58"))
    assert hub.unrouted == []
