"""The template over a real network on loopback: a SuperLink, SuperNodes and `flwr run`, each a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from datasets import Dataset

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'hfnoise[flower]'")

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 240  # seconds for anything, on a busy machine
BOTH, STATE_FILE = ["client-0", "client-1"], "flower_client.safetensors"


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(condition, what, logs):
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail(f"{what} did not come; {logs()}")
        time.sleep(0.2)
    return found


class Network:
    """Starts Flower's processes, and ends all of them with their children."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        self.link, *self.ports = free_ports(4)
        home = folder / "flower"
        home.mkdir()
        connection = f'[superlink.loopback]\naddress = "127.0.0.1:{self.link}"\ninsecure = true\n'
        (home / "config.toml").write_text(connection)
        self.environment = {
            **os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip

    def start(self, name, *command):
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.processes.append(process)
        return process

    def prepare(self, client):
        """Give a client what it would otherwise compute: its rows, and the noise of its three rounds at epsilon 6."""
        folder = self.folder / f"client{client}"
        Dataset.from_dict({"text": [f"def f{k}(self):\n    return {k}" for k in range(24)]}).save_to_disk(
            folder / "data"
        )
        (folder / "federated_client.json").write_text(json.dumps({"rounds": [], "noise_multiplier": 0.7}))

    def start_node(self, client):
        return self.start(
            f"node{client}", "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.link}",
            "--port", str(self.ports[client]),
            "--node-config", f'partition-id={client} state-dir="{self.folder / f"client{client}"}"',
        )  # fmt: skip

    def run(self, *options, **settings):
        given = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        command = ("flwr", "run", str(ROOT / "examples" / "flower"), "loopback", "-c", given, *options)
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def logs(self):
        return "\n".join(f"{file.name}:\n{file.read_text()[-3000:]}" for file in self.folder.glob("*.log"))

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def end(self, process):
        """End a SuperNode in its work, as `kill` does; one that has no time to say so is missed by a timeout only."""
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        for child in children:
            child.kill()
        process.wait(PATIENCE)

    def kill_server_app(self):
        (link, *_) = self.processes
        children = psutil.Process(link.pid).children(recursive=True)
        found = [one for one in children if "flwr-serverapp" in " ".join(one.cmdline())]
        for one in found:
            one.kill()
        assert found

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                children = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGKILL)
                for child in children:
                    child.kill()
                process.wait(PATIENCE)


@pytest.fixture
def network(tmp_path):
    network = Network(tmp_path)
    yield network
    network.close()


@pytest.mark.slow
def test_template_survives_a_killed_node_and_a_killed_server(network, tmp_path):
    report_file = tmp_path / "out" / "federation_report.json"

    def report():
        return json.loads(report_file.read_text()) if report_file.exists() else {"history": []}

    def begun(client, rounds):
        file = tmp_path / f"client{client}" / "federated_client.json"
        return len(json.loads(file.read_text())["rounds"]) >= rounds

    def answered(client):
        began, done = (tmp_path / f"client{client}" / f"federated_{name}" for name in ("client.json", STATE_FILE))
        return done.exists() and done.stat().st_mtime_ns > began.stat().st_mtime_ns

    network.start(
        "superlink", "flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
        "--port", str(network.link),
    )  # fmt: skip
    for client in (0, 1):
        network.prepare(client)
    nodes = [network.start_node(client) for client in (0, 1)]
    for name in ("node0", "node1"):
        wait_for(lambda: "SuperNode ID" in network.log(name), "a SuperNode", network.logs)  # noqa: B023
    settings = {
        "output-dir": str(tmp_path / "out"), "rounds": 2, "local-steps": 1, "batch-size": 4, "rows": 24,
        "round-timeout": float(PATIENCE),
    }  # fmt: skip
    network.run(**settings)
    wait_for(lambda: begun(1, 1), "client 1 in round 0", network.logs)
    network.end(nodes[1])
    wait_for(lambda: len(report()["history"]) == 1, "round 0 without client 1", network.logs)
    wait_for(lambda: begun(0, 2) and answered(0), "the answer of client 0 in round 1", network.logs)
    network.kill_server_app()
    assert len(report()["history"]) == 1  # nobody has got that answer
    network.start_node(1)  # comes back, with its folder
    table = network.run("--stream", **settings)
    assert re.search(r"client-0.*\b24,576\b", table), table
    assert [(one["round"], one["answered"]) for one in report()["history"]] == [(0, ["client-0"]), (1, BOTH)]
    # Client 0 was asked for round 1 twice and trained once; client 1 has lost an answer. The cap is 2.
    assert {name: one["participations"] for name, one in report()["clients"].items()} == dict.fromkeys(BOTH, 2)
    assert 0 < report()["epsilon"] <= 6 * (1 + 1e-6)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists()
