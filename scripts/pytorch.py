#!/usr/bin/env python3
"""PyTorch's attention on the shapes of docs/performance.md, to set beside `compare` on the same card: f16 by its FLASH backend,
f32 by its EFFICIENT one, forward and backward. Needs PyTorch with CUDA, and triton.

    pytorch.py ["B,H,N,D;..."]
"""
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from triton.testing import do_bench

BACKENDS = {torch.float16: SDPBackend.FLASH_ATTENTION, torch.float32: SDPBackend.EFFICIENT_ATTENTION}
SHAPES = "4,16,1024,64;4,16,4096,64;2,16,4096,128;1,16,16384,64;1,16,16384,128"

print(torch.cuda.get_device_name(), torch.__version__)
print("backend,dtype,B,H,N,D,causal,forward_ms,forward_TFLOPS,backward_ms,backward_TFLOPS")
for shape in (sys.argv[1] if len(sys.argv) > 1 else SHAPES).split(";"):
    b, h, n, d = map(int, shape.split(","))
    for causal in (False, True):
        for dtype, backend in BACKENDS.items():
            q, k, v = (torch.randn(b, h, n, d, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
            gradient = torch.randn_like(q)
            with sdpa_kernel(backend):
                forward = do_bench(lambda: sdpa(q, k, v, is_causal=causal), return_mode="median")
                out = sdpa(q, k, v, is_causal=causal)
            step = lambda: out.backward(gradient, retain_graph=True)
            backward = do_bench(step, return_mode="median", grad_to_none=[q, k, v])
            work = 4 * b * h * n * n * d / (2 if causal else 1) / 1e9
            times = f"{forward:.3f},{work / forward:.1f},{backward:.3f},{2.5 * work / backward:.1f}"
            print(f"{backend.name},{str(dtype)[6:]},{b},{h},{n},{d},{int(causal)},{times}", flush=True)
