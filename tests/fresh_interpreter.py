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


def in_fresh_interpreter(
    function: Callable[..., Any], *arguments: Any, timeout: float, **environment: str
) -> Any:
    """What a module-level function returns there; it and its arguments travel as JSON."""
    call = f"{function.__module__}.{function.__name__}(*json.loads({json.dumps(arguments)!r}))"
    code = f"import json, {function.__module__}; print(json.dumps({call}))"
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
