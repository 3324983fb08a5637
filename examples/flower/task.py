"""What both sides of the app share: the model, and which client has which code."""

# The private data: the code of three packages that every Python has. The model was trained on docstrings only.
PACKAGES = ("asyncio", "email", "unittest")


def make_model():
    """Return the docstrings model with a fresh adapter; every side makes the same one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from hfnoise import freeze_lora_A
    from hfnoise.worlds.docstrings import model_path

    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return freeze_lora_A(get_peft_model(AutoModelForCausalLM.from_pretrained(model_path()), adapter))


def client_data(client, rows, folder):
    """Return the code of a client's package; kept in a folder, since every round is a new process."""
    from datasets import load_from_disk

    from hfnoise.worlds.code import code_texts

    if not folder.exists():
        package = PACKAGES[client % len(PACKAGES)]
        texts = code_texts("train")
        mine = [number for number, module in enumerate(texts["module"]) if module.split(".")[0] == package]
        texts.select(mine[:rows]).select_columns("text").save_to_disk(folder)
    return load_from_disk(folder)
