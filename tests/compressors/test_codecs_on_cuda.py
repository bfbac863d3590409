"""On a CUDA device: the bytes of the CPU path, without the host ever waiting where sizes are fixed."""

from __future__ import annotations

import pytest
import torch
from codec_cases import DTYPES, SPECS, compress, make

from compressors import Payload
from compressors.check import hidden_states, side_inputs
from compressors.rows import RowCodec

# a nested absmax holds a mean, whose rounding depends on the order of the sum
ROW_CODECS = [s for s in SPECS if isinstance(make(s), RowCodec) and "nested" not in s]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ROW_CODECS)
def test_bytes_and_values_are_those_of_the_cpu(spec, dtype):
    x = hidden_states((2, 33, 576), dtype)
    on_cpu = make(spec, dtype, 576).compress(x)
    on_cuda = make(spec, dtype, 576).compress(x.cuda())
    assert torch.equal(on_cuda.data.cpu(), on_cpu.data)
    decoded = make(spec, dtype, 576).decompress(on_cuda, torch.device("cuda"), dtype)
    assert torch.equal(decoded.cpu(), make(spec, dtype, 576).decompress(on_cpu, torch.device("cpu"), dtype))


@pytest.mark.parametrize("spec", SPECS)
def test_a_frame_decodes_on_either_side(spec):
    x = hidden_states((2, 33, 576))
    payload = compress(make(spec, hidden_size=576), x.cuda())
    on_cuda = make(spec, hidden_size=576).decompress(payload, torch.device("cuda"), x.dtype)
    copied = Payload(payload.data.cpu(), payload.shape, payload.meta)
    on_cpu = make(spec, hidden_size=576).decompress(copied, torch.device("cpu"), x.dtype)
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [s for s in SPECS if make(s).fixed_size])
def test_the_host_does_not_wait(spec):
    x = hidden_states((2, 33, 576)).cuda()
    codec = make(spec, hidden_size=576)
    side = side_inputs(codec, x)
    codec.decompress(compress(codec, x), x.device, x.dtype)  # constants reach the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        codec.decompress(codec.compress(x, **side), x.device, x.dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
