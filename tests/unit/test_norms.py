"""RMS norms by torch's own operation (`norms`): where the bits are the same, and where no gradients are recorded."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pipeline.models.norms import fuse_norms


class OtherRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) * 1.0000001


def make(kind, size=96):
    norm = kind(size, eps=1e-5)
    generator = torch.Generator().manual_seed(1)
    norm.weight.data.normal_(generator=generator)
    return norm.requires_grad_(False), torch.randn(3, 5, size, generator=generator)


@pytest.mark.parametrize(("kind", "is_fused"), [(LlamaRMSNorm, True), (GemmaRMSNorm, True), (OtherRMSNorm, False)])
def test_norms_are_fused_where_the_bits_are_the_same(kind, is_fused):
    norm, x = make(kind)
    before = norm(x)
    fuse_norms(torch.nn.Sequential(norm))
    assert ("forward" in vars(norm)) is is_fused
    with torch.inference_mode():
        assert torch.equal(norm(x), before)


def test_gradients_are_those_of_the_plain_norm():
    norm, x = make(LlamaRMSNorm)
    plain, _ = make(LlamaRMSNorm)
    fuse_norms(torch.nn.Sequential(norm))
    gradients = []
    for each in (norm, plain):
        own = x.clone().requires_grad_()
        each(own).square().sum().backward()
        gradients.append(own.grad)
    assert torch.equal(*gradients)
