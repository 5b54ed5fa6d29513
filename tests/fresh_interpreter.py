"""Functions of test modules in a process of their own.

Triton decides when a kernel's module is imported whether kernels are compiled or interpreted (on
the CPU, `TRITON_INTERPRET=1`), so what is interpreted may not share a process with other tests.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def in_fresh_interpreter(function: Callable[[], Any], timeout: float, **environment: str) -> Any:
    """What a module-level function without arguments returns there; it travels as JSON."""
    module = function.__module__
    code = f"import json, {module}; print(json.dumps({module}.{function.__name__}()))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])
