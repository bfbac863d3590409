"""What codecs ask of an accelerator: no value on the host, and no quotient that is another there.

Torch on CUDA turns `x / 448.0` into `x * (1 / 448.0)`, and so it does where the divisor is a tensor on the CPU. A
divisor on the tensor's own device is divided by. What a codec asks for is seen here on the meta device, which takes
the path of an accelerator; the codecs that need host memory are watched on the CPU.
"""

from __future__ import annotations

import math

import klt_cases
import pytest
import torch
from codec_cases import DTYPES, MANY_SLOW_SPECS, compress, make
from torch.utils._python_dispatch import TorchDispatchMode

from compressors.check import hidden_states, side_inputs, travelling
from compressors.klt.transform import TorchTransform
from compressors.rows import divide
from tests.helpers.marks import slow_but


class Divisions(TorchDispatchMode):
    """Takes down the divisors by which CUDA would not divide."""

    def __init__(self):
        super().__init__()
        self.replaced = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::div", "aten::div_"):
            x, divisor = args[:2]
            if isinstance(divisor, torch.Tensor):
                exact = divisor.device == x.device
            else:
                exact = abs(math.frexp(divisor)[0]) == 0.5
            if not exact:
                self.replaced.append(divisor)
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_what_cuda_would_replace():
    x, out = torch.ones(3, device="meta"), torch.ones(3, device="meta")
    with Divisions() as divisions:
        x / 448.0
        x.div_(3)
        torch.div(x, 5.0, out=out)
        x / torch.tensor(7.0)
        x / 16
        1.0 / x
        divide(x, 448.0)
    assert [float(divisor) for divisor in divisions.replaced] == [448, 3, 5, 7]


@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16], DTYPES), ids=str)
@pytest.mark.parametrize("spec", MANY_SLOW_SPECS)
def test_accelerator_path_reads_no_value_on_the_host_and_divides_by_no_number(spec, dtype):
    """The meta device has shapes but no values: an operation that would make the host wait raises there."""
    x = torch.empty(2, 9, 576, device="meta", dtype=dtype)
    sender, receiver = make(spec, dtype, 576), make(spec, dtype, 576)
    if "zstd" in spec:
        with pytest.raises(NotImplementedError, match="no data"):
            compress(sender, x)
        return
    with Divisions() as divisions:
        payload = compress(sender, x)
        decoded = receiver.decompress(payload, x.device, dtype)
    assert payload.data.device == x.device and payload.nbytes == sender.max_nbytes(x.shape)
    assert decoded.device == x.device and decoded.shape == x.shape and decoded.dtype == dtype
    assert divisions.replaced == []


@pytest.mark.parametrize("options", [{"name": "klt", "step": 0.3}, {"name": "klt_fixed", "nbits": 3.0}], ids=str)
def test_no_division_by_a_number_in_calibrated_codecs(options):
    subject, x = klt_cases.Calibrated(options), hidden_states((1, 9, 96))
    codec = subject.make(x)
    side = side_inputs(codec, x)
    with Divisions() as divisions:
        codec.decompress(codec.compress(x, **side), x.device, x.dtype, **travelling(codec, side))
    assert divisions.replaced == []


def test_no_division_by_a_number_in_klts_transform_for_accelerators():
    x, cpu = hidden_states((1, 9, 96)), torch.device("cpu")
    calibration, tokens = klt_cases.calibrate(96, True)
    transform = TorchTransform(calibration, tokens, 0.3, cpu)
    with Divisions() as divisions:
        analysis = transform.analyse(x[0])
        transform.synthesise(analysis.y, analysis.rms.numpy(), cpu, torch.float32)
    assert divisions.replaced == []


def test_divide_rounds_once():
    x = hidden_states((4, 1000))
    expected = torch.from_numpy(x.numpy() / torch.tensor(448.0).numpy())
    assert torch.equal(divide(x, 448.0), expected)
    assert not torch.equal(x * (1 / torch.tensor(448.0)), expected), "the reciprocal gives other floats"


