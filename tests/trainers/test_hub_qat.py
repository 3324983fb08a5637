"""A quantised run with push_to_hub: packed at the end with its card, equal after a download, refused by stock code."""

import textwrap

import pytest
from huggingface_hub import ModelCard

pytestmark = [pytest.mark.hub, pytest.mark.slow]  # fresh processes that import all libraries

TRAIN = """
    import os
    import torch
    from transformers import AutoModelForCausalLM
    from hfnoise import QATTrainer, QATTrainingArguments

    torch.set_num_threads(1)
    rows = [{"input_ids": [3 + (n * k) % 17 for k in range(12)]} for n in range(16)]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    args = QATTrainingArguments(
        output_dir="quest", bit_schedule="4:0.5,1:0.5", max_steps=4, save_steps=2, learning_rate=1e-2, use_cpu=True,
        report_to="none", push_to_hub=True, hub_strategy="every_save", hub_token="hf_x", disable_tqdm=True,
    )
    trainer = QATTrainer(AutoModelForCausalLM.from_pretrained(os.environ["MODEL"]), args=args, train_dataset=rows)
    trainer.train()
    trainer._finish_current_push()
    trainer.push_to_hub(dataset_name="tester/rows", tags=["mine"])
    with torch.no_grad():
        torch.save(trainer.model.eval()(torch.tensor([[5, 6, 7]])).logits, "logits.pt")
"""

PULL = """
    import torch
    import hfnoise
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained("tester/quest")
    with torch.no_grad():
        print(torch.equal(model(torch.tensor([[5, 6, 7]])).logits, torch.load("logits.pt")))
    print({str(p.dtype) for n, p in model.state_dict().items() if n.endswith("_proj.weight")})
"""

STOCK = """
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained("tester/quest")
    except RuntimeError as error:
        print("refused:", "size mismatch" in str(error) or "mismatch" in str(error))
"""


def test_pushed_packed_and_loaded_equal(hub, run_python, tiny_model_path, tmp_path):
    run_python(textwrap.dedent(TRAIN), {"MODEL": tiny_model_path})
    lines = run_python(textwrap.dedent(PULL)).splitlines()
    assert lines[-2:] == ["True", "{'torch.uint8'}"]
    assert "refused: True" in run_python(textwrap.dedent(STOCK))
    card = ModelCard.load(tmp_path / "quest" / "README.md")
    assert card.data.datasets == ["tester/rows"] and "mine" in card.data.tags
    assert card.data.to_dict()["hfnoise"]["weight_bits"] == 1
    assert 'from_pretrained("tester/quest")' in card.text
    run_python(
        "from huggingface_hub import hf_hub_download; import pathlib\n"
        "assert 'bits of a weight | 1' in pathlib.Path(hf_hub_download('tester/quest', 'README.md')).read_text()"
    )
