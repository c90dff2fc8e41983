"""Where the tools are installed (``pip install .[checkpoint-tests]``), they write the files again, and we load them.

The same checks as ``test_tool_files.py``, on what these versions of the tools write today.
"""

import importlib.util
import os
from pathlib import Path
import subprocess
import sys

import generate
import pytest
import test_tool_files

MODULES = ("torch", "transformers", "compressed_tensors", "llmcompressor", "modelopt")
MISSING = [module for module in MODULES if importlib.util.find_spec(module) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.mark.parametrize("case", list(generate.CASES))
def test_what_the_tool_writes_now(tmp_path, monkeypatch, case):
    command = [sys.executable, str(Path(generate.__file__)), str(tmp_path), case]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert ran.returncode == 0, ran.stderr[-3000:]
    monkeypatch.setattr(test_tool_files, "DATA", tmp_path)
    test_tool_files.test_dequantised_weights_are_the_tools_own_bit_for_bit(case)
    test_tool_files.test_layer_agrees_with_transformers_on_the_decompressed_weights(case)
