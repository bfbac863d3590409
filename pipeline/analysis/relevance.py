"""Relevance of a stage's attention heads by AttnLRP: rules for its backward pass, and sums of what that yields.

The rules of Achtibat et al. 2024 (AttnLRP, arXiv 2402.05602) in gradient form: with them in place, relevance is tensor
times gradient wherever both exist. Outputs stay what they are, bit for bit. Only gradients change, so a stage needs
its input as a leaf and the gradient of its output, and both may come over a link.

* Norm: linear in its input; no gradient through the variance (proposition 3.4).
* Activation f: the gradient is f(x) / x (identity rule, eq. 9).
* Product of two tensors (gate times up, attention times value, query times key): half to each (uniform rule, eq. 7;
  propositions 3.2 and 3.3). Value is one side of one product, query and key are one side each of a product that makes
  one side of another, so gradients of their projections are cut to 1/2, 1/4 and 1/4. Softmax keeps its own gradient,
  which is its rule (proposition 3.1): the attention function, and its causal mask, stay those that the stage runs
  with, and no attention matrix is stored.
* Linear maps, rotary embedding and residual sums: the plain gradient.

Relevance is conserved but for constants, which absorb what reaches them: biases, and the softmax's offset, its value
at equal scores. Both are counted. Starting the backward pass, and turning relevances into weights, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.models.families import FAMILIES, RelevanceParts

__all__ = ["RELEVANCE_MODEL_TYPES", "StageRelevance", "attnlrp", "check_rules"]

RELEVANCE_MODEL_TYPES = tuple(name for name, family in FAMILIES.items() if family.relevance is not None)


class StageRelevance:
    """Sums over the backward passes through one stage of L layers with n heads; float64, on the stage's device.

    Attributes:
        heads: [L, n], signed relevance of each head's output, over all tokens and the head's dimensions.
        biases: [L + 1], what biases absorbed in each layer and in the final norm.
        softmax: [L], what the softmax absorbed in each layer.
        input: scalar, relevance of the stage's input.
        output: scalar, relevance of the stage's output, which `input`, `biases` and `softmax` add up to.
        tokens: float32 [B, T], relevance of the input's positions in the latest backward pass; None before the first.
    """

    def __init__(self, num_layers: int, num_heads: int, device: torch.device) -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.heads = torch.zeros(num_layers, num_heads, **options)
        self.biases = torch.zeros(num_layers + 1, **options)
        self.softmax = torch.zeros(num_layers, **options)
        self.input = torch.zeros((), **options)
        self.output = torch.zeros((), **options)
        self.tokens: torch.Tensor | None = None

    @property
    def bias_share(self) -> float:
        """Share of the output's relevance that biases absorbed; negative or above 1 where signs cancel.

        A pipeline's share is the sum of all stages' `biases` over the last stage's `output`.
        """
        return float(self.biases.sum() / self.output)

    @property
    def softmax_share(self) -> float:
        """The same of `softmax`."""
        return float(self.softmax.sum() / self.output)


def check_rules(model_config: Any) -> RelevanceParts:
    """What the rules go by for a model of this config. Raises ValueError for a model type without rules."""
    family = FAMILIES.get(model_config.model_type)
    if family is None or family.relevance is None:
        raise ValueError(
            f"there are no rules of relevance for model type {model_config.model_type!r}, only for "
            f"{', '.join(RELEVANCE_MODEL_TYPES)}; take such a model, or a metric that needs no relevance of heads"
        )
    return family.relevance


@contextmanager
def attnlrp(decoder: PreTrainedModel) -> Iterator[StageRelevance]:
    """Give a stage's decoder the rules of AttnLRP, and sum up relevance, until the block is left.

    Forward passes that record gradients, and their backward passes, belong inside the block. `inputs_embeds`, on a
    first stage the tokens' embeddings, must require a gradient; parameters need none. For weights of heads, start from
    the true next tokens' logits, summed over scored positions: the gradient of a loss vanishes where the model is sure.

    Args:
        decoder: `StageModel.decoder`, of any slice of layers. Relevances were compared in float32.

    Raises:
        ValueError: for a model type without rules and, in a forward pass that records gradients, for an input that
            requires none.
    """
    config = decoder.config
    parts = check_rules(config)
    num_layers, num_heads = len(decoder.layers), config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    device = decoder.rotary_emb.inv_freq.device  # a stage without layers may have no parameters
    relevance = StageRelevance(num_layers, num_heads, device)
    with ExitStack() as hooks:

        def after(module: nn.Module, hook: Callable) -> None:
            hooks.callback(module.register_forward_hook(hook).remove)

        def before(module: nn.Module, hook: Callable, **options: bool) -> None:
            hooks.callback(module.register_forward_pre_hook(hook, **options).remove)

        for module in decoder.modules():
            if _is_norm(module):
                after(module, _norm_rule)
        layer_of = {}
        for index, layer in enumerate(decoder.layers):
            layer_of.update(dict.fromkeys(layer.modules(), index))
            attention = getattr(layer, parts.attention)
            softmax = relevance.softmax[index]
            for name, factors in parts.projections.items():
                scale = torch.tensor(factors, device=device).repeat_interleave(head_dim)
                after(getattr(attention, name), _attention_rule(scale, softmax))
            before(getattr(attention, parts.heads_out), _count_heads(relevance.heads[index], softmax))
            after(getattr(layer.mlp, parts.activation), _activation_rule)
            if parts.gated_out is not None:
                before(getattr(layer.mlp, parts.gated_out), _gating_rule)
        # After the rules, since hooks run in the order of registration: a bias sees the gradient that they leave.
        for module in decoder.modules():
            if getattr(module, "bias", None) is not None:
                after(module, _count_bias(relevance.biases[layer_of.get(module, num_layers)]))
        before(decoder, _count_input(relevance), with_kwargs=True)
        after(decoder, _count_output(relevance))
        yield relevance


class _Scaled(torch.autograd.Function):
    """`output` in the forward pass; in the backward pass `scale * input`, with a constant `scale`."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, output: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scale)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return gradient * scale, None, None


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or hasattr(module, "variance_epsilon")  # the latter is an RMS norm


def _norm_rule(norm: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Centring, where the norm does it, keeps its gradient; weight over standard deviation is a constant."""
    (hidden_states,) = args
    if isinstance(norm, nn.LayerNorm):
        hidden_states = hidden_states - hidden_states.mean(-1, keepdim=True)
    epsilon = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
    with torch.no_grad():
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        scale = norm.weight * torch.rsqrt(variance + epsilon).to(hidden_states.dtype)
    return _Scaled.apply(hidden_states, output.detach(), scale)


def _activation_rule(_: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    (preactivation,) = args
    with torch.no_grad():
        scale = torch.where(preactivation == 0, 0, output / preactivation)
    return _Scaled.apply(preactivation, output.detach(), scale)


def _gating_rule(_: nn.Module, args: tuple) -> None:
    (product,) = args
    if product.requires_grad:
        product.register_hook(lambda gradient: gradient / 2)


def _attention_rule(scale: torch.Tensor, softmax: torch.Tensor) -> Callable:
    """`scale` [d] repeats along the projection's output. What reaches the projections did not stay in `softmax`."""

    def hook(_: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if not output.requires_grad:
            return
        projected = output.detach()

        def cut(gradient: torch.Tensor) -> torch.Tensor:
            gradient = (gradient.unflatten(-1, (-1, len(scale))) * scale).flatten(-2).to(gradient.dtype)
            softmax.sub_(_total(projected * gradient))
            return gradient

        output.register_hook(cut)

    return hook


def _count_heads(heads: torch.Tensor, softmax: torch.Tensor) -> Callable:
    """Add the relevance of the heads' outputs to `heads` [n]; all of it may stay in `softmax`, for now."""

    def hook(_: nn.Module, args: tuple) -> None:
        (outputs,) = args
        if outputs.requires_grad:
            values = outputs.detach()

            def count(gradient: torch.Tensor) -> None:
                per_head = (values * gradient).unflatten(-1, (len(heads), -1)).sum((0, 1, 3), dtype=torch.float64)
                heads.add_(per_head)
                softmax.add_(per_head.sum())

            outputs.register_hook(count)

    return hook


def _count_bias(total: torch.Tensor) -> Callable:
    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:

            def count(gradient: torch.Tensor) -> None:
                total.add_(_total(gradient * module.get_parameter("bias").detach()))

            output.register_hook(count)

    return hook


def _count_output(relevance: StageRelevance) -> Callable:
    def hook(_: nn.Module, args: tuple, output: Any) -> None:
        hidden_states = output.last_hidden_state
        if hidden_states.requires_grad:
            values = hidden_states.detach()

            def count(gradient: torch.Tensor) -> None:
                relevance.output.add_(_total(values * gradient))

            hidden_states.register_hook(count)

    return hook


def _count_input(relevance: StageRelevance) -> Callable:
    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        hidden_states = kwargs.get("inputs_embeds")
        if hidden_states is None or not hidden_states.requires_grad:
            raise ValueError(
                "no relevance would reach the stage's input: with gradients recorded, inputs_embeds must be hidden "
                "states or embeddings that require a gradient; pass them after .detach().requires_grad_()"
            )
        values = hidden_states.detach()

        def count(gradient: torch.Tensor) -> None:
            relevance.tokens = (values * gradient).sum(-1, dtype=torch.float32)
            relevance.input.add_(_total(values * gradient))

        hidden_states.register_hook(count)

    return hook


def _total(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.sum(dtype=torch.float64)
