"""Metadata of the distribution `nest-safety`; the import name is `nest`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "nest" / "version.py").read_text(encoding="utf-8"), re.M
).group(1)

# The folder kernels/ is imported as nest_kernels: a package named `kernels` would shadow a library
# that transformers imports.
kernels = [
    name.replace("kernels", "nest_kernels", 1) for name in find_packages(".", include=["kernels*"])
]

setup(
    name="nest-safety",
    version=VERSION,
    description="Neuron-selective safety tuning of language models: find the neurons that carry "
    "refusal, train one small shared update per cluster, ship it as an exact patch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(".", include=["nest", "nest.*"]), *kernels],
    package_dir={"nest_kernels": "kernels"},
    package_data={
        "nest": ["py.typed"],
        "nest.organism": ["data/*", "data/prompts/*", "data/model/*"],
        "nest.reporting": ["*.j2"],
        "nest.comparison": ["*.j2"],
        "nest_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.6",
        "transformers>=5.0,<6",
        "scikit-learn>=1.4",
        "scipy>=1.15",
        "psutil>=5.9",
        "numpy>=1.26",
        "datasets>=3.0",
        "pyarrow>=15",
        "einops>=0.8",
        "safetensors>=0.4.5",
        "jaxtyping>=0.2.34",
        "cyclopts>=5",
        "pydantic>=2.7",
        "rich>=13.7",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "httpx>=0.27",
        "tenacity>=8.3",
    ],
    extras_require={
        "gpu": ["triton>=3.2; platform_system == 'Linux'"],
        "baselines": ["peft>=0.14", "accelerate>=1.0"],
        "compare": ["statsmodels>=0.14.4", "peft>=0.18", "accelerate>=1.4"],
        "bench": ["peft>=0.14", "accelerate>=1.0", "nnsight>=0.5"],
        "vllm": ["vllm>=0.8.5; platform_system == 'Linux'"],
        "eval": ["lm-eval>=0.4.5"],
        "loops": ["trl>=1.0", "accelerate>=1.4", "peft>=0.18"],
        "dev": [
            "pytest>=8",
            "ruff>=0.9",
            "mypy>=1.14",
            "import-linter>=2",
            "beartype>=0.20",
            "trl>=1.0",
            "accelerate>=1.4",
            "peft>=0.18",
            "statsmodels>=0.14.4",
            "gguf>=0.17",
            "pre-commit>=4",
            # Torch 2.6 brings triton 3.2: a higher bound here would have pip take another torch.
            "triton>=3.2; platform_system == 'Linux'",
        ],
    },
    entry_points={"console_scripts": ["nest = nest.cli.main:run"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
