"""`from_pretrained` knows a QuestConfig whatever is imported first."""

import subprocess
import sys

import pytest


@pytest.mark.slow  # a fresh interpreter each
@pytest.mark.parametrize(
    "first",
    [
        "from hfnoise import prepare_qat",
        "import hfnoise, hfnoise.quantization.hf_layers",
    ],
)
def test_registered(first):
    code = (
        f"import warnings; warnings.simplefilter('error', UserWarning); {first}; "
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; print(known['quest'].__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "QuestHfQuantizer", done.stderr
