"""The embedded worlds: small real data sets and models, built by code, that need no download.

* `hfnoise.worlds.docstrings`: English and code from the Python standard library, preference pairs, a tiny Llama.
* `hfnoise.worlds.code`: code that this Llama has not read, as private data.
* `hfnoise.worlds.expressions`: a classification task on that code.
* `hfnoise.worlds.federated`: clients with skewed labels, or with packages of their own.
* `hfnoise.worlds.digits`: handwritten digits and prompts for them; `hfnoise.worlds.coloured_digits`: harder prompts.
  `hfnoise.worlds.digits_checkpoints`: tiny Stable Diffusion pipelines that draw them, with verifier and judge.
* `hfnoise.worlds.gaussian_mixture`: a mixture whose denoiser is known exactly.
* `hfnoise.worlds.tiny_pipelines`: a real pipeline with random weights of every family that diffusers guides.
"""
