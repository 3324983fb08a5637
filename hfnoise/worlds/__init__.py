"""The embedded worlds: small real data sets and models, built by code, that need no download.

* `hfnoise.worlds.docstrings`: English and code from the Python standard library, preference pairs, a tiny Llama.
"""
