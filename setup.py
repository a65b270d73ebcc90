"""Package metadata of hf_dpclip."""

import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "hf_dpclip" / "__init__.py").read_text(encoding="utf-8"))[1]

PLOT = ["matplotlib>=3.8"]
EXAMPLES = [*PLOT, "easy-vqa>=1.0", "mlxtend>=0.23", "scikit-learn>=1.3"]
DEMO = [*PLOT, "gradio>=6"]
TRACKERS = ["optuna>=4", "tensorboard>=2.18", "trackio>=0.5"]
TEST = [
    *EXAMPLES,
    *DEMO,
    *TRACKERS,
    "build>=1.2",
    "hypothesis>=6",
    "ipython>=8",
    "mypy>=1.15",
    "playwright>=1.45",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.14",
]

setup(
    name="hf_dpclip",
    version=VERSION,
    description="Differentially private CLIP training for the Hugging Face ecosystem",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hf_dpclip", "hf_dpclip.*"]),
    package_data={"hf_dpclip": ["py.typed"]},
    python_requires=">=3.10",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    install_requires=[
        "accelerate>=1.10,<2",
        "datasets>=4.0",
        "dp-accounting>=0.6,<0.7",
        "evaluate>=0.4.6",
        "huggingface_hub>=1.0",
        "peft>=0.18.1",
        "pillow>=10",
        "rich>=13",
        "scipy>=1.11",
        "torch>=2.7",
        "transformers>=5.3,<6",
    ],
    entry_points={"console_scripts": ["hf-dpclip = hf_dpclip.cli:main"]},
    extras_require={"demo": DEMO, "examples": EXAMPLES, "plot": PLOT, "test": TEST},
)
