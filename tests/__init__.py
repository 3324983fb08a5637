"""A package, so that `from tests.minihub import MiniHub` finds this folder and no other of the same name."""
