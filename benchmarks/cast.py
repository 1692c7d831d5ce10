"""Every FP8 cast kernel against the bandwidth of a copy on the same chip, counting bytes read and written.

Inputs are 512 MiB of bf16. A kernel's share is its bandwidth over the copy's; the figure is the smallest share. Every
kernel's result is
compared bit by bit with the reference, on heavy-tailed data with zeros, subnormals, outliers, infinities and NaN;
`bits_differ` counts what is not equal.

    moe-rl bench cast
"""
from statistics import median

import torch
import torch.nn.functional as F

from moe_rl.bench import device_times, needs_hopper


def ms(f): return median(device_times(f))


def size(*tensors): return sum(t.numel()*t.element_size() for t in tensors)


def corners(M, K):
    x = torch.randn(M, K, device="cuda")*torch.randn(M, K, device="cuda").exp()**2
    x[0] = 0
    x[1] *= 1e-40
    x[2,K//2] = 3e4
    x[3,1] = float("inf")
    x[4,K-1] = float("nan")
    x[5] *= 1e-5
    x[6] *= 1e-12
    return x.bfloat16()


def differ(got, want):
    "Numbers and scales whose bits are not the same; any NaN equals any NaN."
    count = 0
    for a, b in zip(got[:2], want[:2]):
        if a.dtype == torch.float8_e4m3fn:
            a, b = (torch.where(t.view(torch.uint8) & 127 == 127, 127, t.view(torch.uint8)).float() for t in (a, b))
        count += (a.nan_to_num(-1.) != b.nan_to_num(-1.)).sum().item()
    return count


def check():
    "Values that differ from the reference, per kernel."
    from moe_rl.fp8.kernels import cast_blocks, cast_both, cast_rows
    from moe_rl.fp8.quant import quantise
    bad = dict(rows=0, rows_transposed=0, blocks_transposed=0)
    for shape in ((384, 1024), (300, 640), (256, 200), (8192, 4096)):
        x = corners(*shape)
        for ue8m0 in (False, True): bad["rows"] += differ(cast_rows(x, ue8m0), quantise(x, ue8m0=ue8m0))
        a, at = cast_both(x)
        bad["rows_transposed"] += differ(a, quantise(x)) + differ(at,
            quantise(F.pad(x, (0, 0, 0, -len(x) % 128)).T.contiguous()))
        w = torch.stack([x, corners(*shape)])
        a, at = cast_blocks(w, transpose=True)
        bad["blocks_transposed"] += differ(a, quantise(w, (128, 128))) + differ(at,
            quantise(w.mT.contiguous(), (128, 128)))
    return bad


def measure(args):
    needs_hopper()
    from moe_rl.fp8.kernels import cast_blocks, cast_both, cast_rows, swiglu_cast
    from moe_rl.fp8.quant import quantise
    from moe_rl.gpu.experts import Layout
    torch.manual_seed(0)
    bad = check()
    x = torch.randn(65536, 4096, device="cuda").bfloat16()
    y = torch.empty_like(x)
    copy = 2*size(x)/ms(lambda: y.copy_(x))/1e6
    print(f"copy of {size(x)>>20} MiB: {copy:.0f} GB/s")
    rows = torch.arange(len(x), device="cuda", dtype=torch.int32)
    lay, gates = Layout(rows.view(-1, 8), rows, rows[-1:]+1, rows[-1:]+1), torch.rand(len(x)//8, 8, device="cuda")
    g, u = x[:,:2048].float(), x[:,2048:].float()
    bad["swiglu"] = differ(swiglu_cast(x, gates, lay), quantise((g*g.sigmoid()*u*gates.view(-1, 1)).bfloat16()))
    del g, u
    print(f"values that differ from the reference: {bad}")
    w = x.view(32, 2048, 4096)
    both = lambda q: [t for a in q for t in a[:2]]
    kernels = dict(rows=(lambda: cast_rows(x), lambda q: q[:2]), rows_transposed=(lambda: cast_both(x), both),
                   blocks=(lambda: cast_blocks(w), lambda q: q[:2]),
                   blocks_transposed=(lambda: cast_blocks(w, transpose=True), both),
                   swiglu=(lambda: swiglu_cast(x, gates, lay), lambda q: [*q[:2], gates, rows]))
    figures = {}
    for name, (f, written) in kernels.items():
        moved = size(x, *written(f()))
        t = ms(f)
        figures[name] = moved/t/1e6/copy
        print(f"{name:18s} {t:6.3f} ms  {moved/t/1e6:5.0f} GB/s  {figures[name]:.3f} of the copy", flush=True)
    return dict(figures=dict(share_of_copy=min(figures.values()), bits_differ=sum(bad.values()), copy_gb_s=copy,
        **figures))
