"""A federation over Flower in one process: its real messages, records, strategy and apps, and no network."""

from dataclasses import replace

import torch
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import context_from_proto, context_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hfnoise import freeze_lora_A
from hfnoise.trainers.federated import FedSVDConfig, FedSVDServer

CONFIG = FedSVDConfig(rounds=2, local_steps=1)


def identify(monkeypatch):
    """Messages carry the identity of the process that makes them; a SuperLink would have given it one."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def adapted(path, freeze=True, **settings):
    """Return the tiny model with an adapter, the same for everybody."""
    torch.manual_seed(5)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), LoraConfig(**settings))
    return freeze_lora_A(model) if freeze else model


def rows(client, count):
    texts = [[3 + (7 * client + 3 * k + j) % 15 for j in range(6)] for k in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in texts]


def plain_trainer(model, client, folder, count=None):
    """Return a Trainer on data of a client: 8 rows, or 8 more for each further client."""
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=4,
        learning_rate=0.05, logging_strategy="no", optim="sgd",
    )  # fmt: skip
    return Trainer(model, args=arguments, train_dataset=rows(client, 8 * (client + 1) if count is None else count))


class InProcess(Grid):
    """A Grid whose nodes answer at once. Everything passes through Flower's serialisation, as over a network."""

    def __init__(self, app):
        self.app, self.contexts, self.sent = app, {}, []
        self.dead, self.tamper = set(), lambda node, content: content
        for client in range(2):
            self.join(client + 1, client)

    def join(self, node, client, **node_config):
        self.contexts[node] = Context(1, node, {"partition-id": client, **node_config}, RecordDict(), {"clients": 2})

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.sent.append((node, message.content))
            if node in self.dead:
                continue
            content = self.tamper(node, recorddict_from_proto(recorddict_to_proto(message.content)))
            received = Message(content, node, message.metadata.message_type)
            # Nothing survives in the process of a client but its state.
            context = context_from_proto(context_to_proto(self.contexts[node]))
            replies.append(self.app(received, context))
            self.contexts[node] = context_from_proto(context_to_proto(context))
        return replies

    def get_node_ids(self):
        return list(self.contexts)

    def get_nodes(self):
        raise NotImplementedError

    def set_run(self, run):
        raise NotImplementedError

    run = property()

    def create_message(self, *given, **named):
        raise NotImplementedError

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError


def federate(server, strategy, grid, rounds=None):
    """Run rounds as Flower does, and hand over the last average."""
    result = strategy.start(grid, strategy.initial_arrays(), num_rounds=rounds or server.config.rounds)
    strategy.take_average(result.arrays)
    server.rotate()
    return result


def new_server(path, config=CONFIG, **settings):
    return FedSVDServer(adapted(path, config.aggregation != "fedavg"), replace(config, **settings))
