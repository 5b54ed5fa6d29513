"""bf16 under Triton's interpreter, which stores it as 16-bit integers and computes with those.

Products of matrices and rounding are what the kernels do with bf16; `right_bf16` makes both right,
and products in tf32 beside them as inexact as tensor cores have them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch


@contextmanager
def right_bf16() -> Iterator[None]:
    """Products as tensor cores do them, summed in fp32; rounding to the nearest even.

    Exact but for those in tf32, of whose factors tensor cores leave the last 13 bits out.
    """
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    convert, precisions = interpreter._convert_float, "allowed_dot_input_precisions"

    def widened(numbers: np.ndarray) -> np.ndarray:
        return (numbers.astype(np.uint32) << 16).view(np.float32)

    def rounded(numbers: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(np.ascontiguousarray(numbers))
        return tensor.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    def right_convert(numbers, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return rounded(numbers)
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(numbers)
        return convert(numbers, source, target, rounding_mode)

    def factor(tensor, input_precision):
        if tensor.dtype.scalar == tl.bfloat16:
            return widened(tensor.data)
        if input_precision == ir.INPUT_PRECISION.TF32:
            return (tensor.data.view(np.int32) & -0x2000).view(np.float32)
        return tensor.data

    def right_dot(self, a, b, total, input_precision, max_num_imprecise_acc):
        left, right = factor(a, input_precision), factor(b, input_precision)
        product = np.matmul(left, right, dtype=total.data.dtype)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    options = interpreter.interpreter_builder.options
    allowed = (*getattr(options, precisions), "bf16x3")
    with (
        mock.patch.object(interpreter, "_convert_float", right_convert),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", right_dot),
        mock.patch.dict(vars(options), {precisions: allowed}),
    ):
        yield
