"""Packaging of hfnoise: the top-level folders become sub-packages of one package.

`trainers/` is installed as `hfnoise.trainers`, `pipelines/` as `hfnoise.pipelines`, `model_cards/` as
`hfnoise.model_cards` and `benchmarks/` as `hfnoise.benchmarks`, so that nothing generic lands in site-packages.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
MAPPED_PARTS = ("trainers", "pipelines", "model_cards", "benchmarks")


def mapped_packages(part: str) -> list[str]:
    """Return the dotted names of the package in folder `part` and of its sub-packages."""
    return [f"hfnoise.{part}"] + [f"hfnoise.{part}.{name}" for name in find_packages(str(ROOT / part))]


def version() -> str:
    """Return the version that `hfnoise/__init__.py` states, without importing it."""
    match = re.search(r'^__version__ = "([^"]+)"', (ROOT / "hfnoise/__init__.py").read_text(encoding="utf-8"), re.M)
    if match is None:
        raise RuntimeError('hfnoise/__init__.py must hold a line of the form __version__ = "1.2.3"')
    return match.group(1)


quant = ["bitsandbytes>=0.50"]
dp = ["dp-accounting>=0.6"]
# The engine only: its simulation would bring Ray, and hfnoise has one of its own.
flower = ["flwr>=1.41"]
# To train the worlds of digits anew; what is shipped runs without.
worlds = ["scikit-learn>=1.5"]
# The site made of docs/, and the Space in examples/space.
# ruff folds long signatures in it.
docs = ["mkdocs-material>=9.8", "mkdocstrings[python]>=1", "ruff>=0.14"]
space = ["gradio>=6.31,<7", "Pillow>=10"]
test = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "beartype>=0.20", "Pillow>=10", "setuptools>=70"]
test += ["wheel>=0.40", *quant, *dp, *flower, *worlds, *docs, *space]

setup(
    name="hfnoise",
    version=version(),
    description="When noise is the problem or the tool: noisy labels, privacy, quantisation and diffusion noise",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",  # as diffusers 0.42
    packages=find_packages(include=["hfnoise", "hfnoise.*"])
    + [name for part in MAPPED_PARTS for name in mapped_packages(part)],
    package_dir={"hfnoise": "hfnoise", **{f"hfnoise.{part}": part for part in MAPPED_PARTS}},
    # `*/*` would drop the nested weights from the wheel.
    package_data={
        "hfnoise": ["py.typed"],
        "hfnoise.quantization.kernels": ["*.cpp"],
        "hfnoise.benchmarks": ["*.json"],
        "hfnoise.model_cards": ["*.md", "**/*"],
    },
    # `**/*` would take compiled files along.
    exclude_package_data={"hfnoise.model_cards": ["__pycache__/*", "**/__pycache__/*"]},
    # Floors are what the joints with the libraries need, and are tested: `make floor`; see docs/design.md.
    install_requires=[
        "torch>=2.13",  # the oldest that is tested; 2.6 lacks what quantised layers ask of autograd
        "transformers>=5.23",
        "trl>=1.16",  # its fused LM head; 1.15 needs Triton even on a CPU
        "accelerate>=1.15",
        "peft>=0.21",
        "datasets>=5.1",  # the first that goes with huggingface_hub 2
        "diffusers>=0.42",
        "huggingface_hub>=2",
        "safetensors>=0.8",
        "jaxtyping>=0.3",
        "wrapt>=1.17",
        "jinja2>=3.1.6",  # transformers asks for it when it applies a chat template
        "pyyaml>=6.0.2",
        "matplotlib>=3.10.7",  # earlier ones warn with the pyparsing of today
        "rich>=14",
        "tqdm>=4.66.3",
    ],
    extras_require={
        "dp": dp,
        "quant": quant,
        "flower": flower,
        "worlds": worlds,
        "docs": docs,
        "space": space,
        "track": ["trackio>=0.40"],
        "test": test,
        "dev": [*test, "mypy>=1.18", "build>=1.2", "selenium>=4", "twine>=6"],
    },
    entry_points={"console_scripts": ["hfnoise = hfnoise.__main__:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords=["DPO", "differential privacy", "quantization", "diffusion", "guidance", "Hugging Face"],
)
