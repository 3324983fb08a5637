"""Benchmarks: each module prints a table and writes JSON (commit, versions, seed, machine) and a PNG."""
