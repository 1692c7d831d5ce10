"""Which product should make the weight gradients of FP8 experts? bf16 by torch, or FP8 by DeepGEMM's k-grouped kernel.

The weight gradients of the layer of `moe_layer` (131072 rows, 128 experts, width 2048, expert width 1024). The bf16
product reads compact rows and writes bf16. The FP8 product
reads groups filled up to 128 rows, already cast and transposed, and adds into float32, which somebody has to have set
to zero. Casts are not in the times. Both results are
compared with a float64 product of one expert.

    moe-rl bench fp8_wgrad
"""
import importlib.util
from statistics import median

import torch

from moe_rl.bench import NeedsHardware, device_times, needs_hopper

T, D, E, K, I = 16384, 2048, 128, 8, 1024


def ms(f): return median(device_times(f))


def measure(args):
    needs_hopper()
    if importlib.util.find_spec("deep_gemm") is None: raise NeedsHardware("DeepGEMM (pip install 'moe_rl[cuda]')")
    import deep_gemm
    from moe_rl.fp8.gemm import by_group, calc_diff
    from moe_rl.fp8.kernels import cast_rows
    from moe_rl.gpu.experts import layouts, permute
    g = torch.Generator("cuda").manual_seed(0)
    idx = torch.rand(T, E, generator=g, device="cuda").topk(K, -1).indices
    lay, compact = layouts(idx, E, 128, 1)
    groups = torch.diff(lay.ends, prepend=lay.ends.new_zeros(1)).int()
    total, figures = len(lay.pairs), dict(ms_bf16=0., ms_fp8=0., ms_fp8_zeroing=0., diff_bf16=0., diff_fp8=0.)
    # any list with this sum: the kernel reads the device's
    sizes = [total//128//E*128]*(E-1)
    sizes.append(total-sum(sizes))
    for m, n in ((D, I), (2*I, D)):
        left, right = (torch.randn(T, w, generator=g, device="cuda").bfloat16() for w in (m, n))
        a, b = permute(left, compact), permute(right, compact)
        dw = torch._grouped_mm(a.T, b, offs=compact.ends)
        figures["ms_bf16"] += ms(lambda: torch._grouped_mm(a.T, b, offs=compact.ends))
        end = int(compact.ends[0])
        want = a[:end].double().T@b[:end].double()
        figures["diff_bf16"] = max(figures["diff_bf16"], calc_diff(dw[0], want))
        a = b = dw = None
        flat = []
        for x in (left, right):
            # padding has to be zero
            q = cast_rows(torch.where((lay.pairs >= 0)[:,None], permute(x, lay), 0.).T.contiguous())
            flat.append((by_group(q.q.view(torch.uint8), groups).view(q.q.dtype), q.scale))
        out = torch.zeros(E, m, n, device="cuda")
        product = lambda: deep_gemm.k_grouped_fp8_gemm_nt_contiguous(*flat, out, sizes, groups, c=out)
        product()
        figures["diff_fp8"] = max(figures["diff_fp8"], calc_diff(out[0], want))
        figures["ms_fp8"] += ms(product)
        figures["ms_fp8_zeroing"] += ms(lambda: out.zero_())
        flat = out = None
    for k, v in figures.items(): print(f"{k:16s} {v:.4g}")
    return dict(figures=figures)
