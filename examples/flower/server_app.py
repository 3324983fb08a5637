"""The server: it has the public model, evaluates on code of other modules, and never sees a client's rows."""

from functools import cache

from hfnoise.trainers.federated_flower import fedsvd_server_app


@cache
def model():
    """Return the model that the server evaluates with."""
    from task import make_model

    return make_model()


def evaluate(server):
    """Return the perplexity of held-out code under the federation's adapter."""
    import torch
    from transformers import AutoTokenizer

    from hfnoise.worlds.code import code_texts
    from hfnoise.worlds.docstrings import model_path

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    texts = list(code_texts("validation", size=200)["text"])
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=96)
    with torch.no_grad():
        logits = server.apply_to(model()).eval()(**batch).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, batch["input_ids"][:, 1:], reduction="none")
    weights = batch["attention_mask"][:, 1:]
    return {"perplexity": float(((losses * weights).sum() / weights.sum()).exp())}


app = fedsvd_server_app(lambda context: model(), evaluate=evaluate)
