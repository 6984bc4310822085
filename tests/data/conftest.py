from pathlib import Path

import pytest

from openrlhf_alp.data.smollm2 import unpack_smollm2


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, converted afresh: a cached folder would hide a broken conversion."""
    return unpack_smollm2(cache_dir=tmp_path_factory.mktemp("cache"))
