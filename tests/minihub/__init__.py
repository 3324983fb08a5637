"""A Hub in memory on 127.0.0.1: enough of the protocol for round trips with the real Hugging Face clients.

No client is told that it talks to a double, and nothing of a client is replaced. The clients read the address of the
Hub when they are imported, so a test runs them in a fresh process: see the fixtures `hub` and `run_python`.
"""

from tests.minihub.server import MiniHub

__all__ = ["MiniHub"]
