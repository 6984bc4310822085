"""Last stage of the installation: import what everything stands on and print its version."""

import importlib
import importlib.metadata
import logging
import os
import sys
import warnings

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")

# The learner package first: its shims are what makes OpenRLHF import without flash-attn.
DISTRIBUTIONS = {
    "openrlhf_alp.learner": "openrlhf-alp",
    "torch": "torch",
    "vllm": "vllm",
    "deepspeed": "deepspeed",
    "ray": "ray",
    "openrlhf.trainer.ppo_trainer": "openrlhf",
    "transformers": "transformers",
}


def main() -> int:
    failed = False
    for module, distribution in DISTRIBUTIONS.items():
        try:
            imported = importlib.import_module(module)
            version = getattr(imported, "__version__", None)
            print(f"  {distribution:14} {version or importlib.metadata.version(distribution)}")
        except Exception as error:
            failed = True
            print(f"  {distribution:14} FAILED: {type(error).__name__}: {error}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
