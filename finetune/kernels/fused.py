"""The operators between the products, with every backend that this machine has."""

from finetune.kernels import cpu_fused, triton_backend  # the first registers the compiled kernels
from finetune.kernels.activation import ACTIVATIONS, act_mul
from finetune.kernels.attention import attention
from finetune.kernels.norm import rms_norm
from finetune.kernels.rope import rope

for _operator in ("rms_norm", "rms_norm_backward", "act_mul", "act_mul_backward", "rope"):
    triton_backend.register(_operator, "triton_fused", _operator)

serves_attention = cpu_fused.serves_attention

__all__ = ["ACTIVATIONS", "act_mul", "attention", "rms_norm", "rope", "serves_attention"]
