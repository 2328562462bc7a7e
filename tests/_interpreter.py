"""Makes Triton's CPU interpreter round casts to small floats as the hardware does.

The interpreter of Triton 3.6–3.9 truncates fp32 → bf16 and gets about 2 % of the casts to fp8
wrong. ``install()`` sends every cast between float types through ml_dtypes: round to nearest
even, and saturation at ±448 for e4m3 as ``cvt.rn.satfinite`` does. It also gives infinite and
NaN arguments the quiet arithmetic of a GPU in place of NumPy's warnings, and drops NaN where a
minimum or maximum does.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_SMALL = {
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
    tl.float8e5: ml_dtypes.float8_e5m2,
}
_FLOATS = {**_SMALL, tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64}


def _cast(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """data holds raw bits for the types NumPy lacks; so does the result."""
    values = data.view(_SMALL[source]) if source in _SMALL else data
    if target == tl.float8e4nv:
        values = np.clip(values.astype(np.float32), -448.0, 448.0)  # clip keeps NaN
    cast = values.astype(_FLOATS[target])
    return cast.view(interpreter._get_np_dtype(target))


def install() -> None:
    """Patch the interpreter's builder, once per process."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "rounds_to_nearest", False):
        return
    builder.rounds_to_nearest = True
    original = builder.cast_impl

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source in _FLOATS and target in _FLOATS:
            data = _cast(np.ascontiguousarray(src.data), source, target)
            return interpreter.TensorHandle(data, target)
        return original(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return cast_impl(self, src, dst_type)

    def create_dot(self, a, b, d, *_):
        # In fp64: the sums of a BLAS in fp32 hang on the machine and on the number of rows, and
        # NumPy would multiply the bits of a bf16 as integers.
        x, y = (self.cast_impl(t, tl.float64).data for t in (a, b))
        total = np.matmul(x, y) + d.data
        return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    # A GPU's minimum and maximum drop NaN unless told to keep it; NumPy's keep it always.
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    builder.create_fp_to_fp = create_fp_to_fp
    np.seterr(all="ignore")
