"""A frozen linear map that holds its weights in eight bits, for a teacher that is a second copy of the model.

Weight-only quantization, symmetric, one scale per output row: the round-to-nearest of LLM.int8() (Dettmers et
al. 2022, arXiv 2208.07339, §2.1) without its outlier split, which activations in full precision do not need.

It is written out here because PyTorch has no public operation for it (`torch._weight_int8pack_mm` is private,
`torch.ao.quantization` is deprecated), and because bitsandbytes and torchao would each be one more dependency
for these few lines.
"""

import torch
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """`x ↦ x Wᵀ + b` with `W[o, i] ≈ scale[o] · quantized[o, i]`.

    Without gradient to the weights. While it is made, one matrix in float32 exists besides; while it runs,
    one in the computing dtype.

    Args:
        linear: The map to imitate, on the device where the copy shall be; it is left as it is.

    Attributes:
        quantized: [out, in], int8, between -127 and 127.
        scale: [out, 1], float32: the row's largest magnitude, divided by 127.
        bias: [out] or None, unquantized.
    """

    quantized: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        largest = torch.linalg.vector_norm(weight, ord=torch.inf, dim=1, keepdim=True)
        scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros stays one
        self.register_buffer("quantized", (weight / scale).round_().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype

    @property
    def weight(self) -> Tensor:
        """The weights in the dtype they had, [out, in], for model code that reads them."""
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weights in a dtype, [out, in], rounded to it once."""
        weight = torch.empty(self.quantized.shape, dtype=dtype, device=self.quantized.device)
        return torch.mul(self.quantized, self.scale, out=weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., in] to [..., out], in autocast's dtype where autocast is on, as `nn.Linear` would."""
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        return nn.functional.linear(inputs, self.dequantized(dtype), self.bias)

    def extra_repr(self) -> str:
        """Tell the shape, as `nn.Linear` does."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"
