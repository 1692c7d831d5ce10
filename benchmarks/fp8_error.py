"""What FP8 loses: quantisation error by scheme and distribution, and DeepGEMM against a float32 product of the same
quantised operands.

The table runs anywhere. The figure, the largest `1 - 2<x,y>/(<x,x>+<y,y>)` over dense, grouped contiguous, grouped
masked and k-grouped products, needs a
Hopper GPU with DeepGEMM.

    moe-rl bench fp8_error
"""
import importlib.util

import torch

from moe_rl.bench import NeedsHardware, needs_hopper
from moe_rl.fp8.quant import SCHEMES, distributions, quantise, relative_error, small_error


def table():
    """Relative error of the matrix, and mean relative error of its smaller half, for every scheme with float32 and
    power-of-two scales."""
    figures = {}
    print(f"{'':16s}" + "".join(f"{s+u:>22s}" for s in SCHEMES for u in ("", ", UE8M0")))
    for name, x in distributions((1024, 1024)).items():
        row = {s+u: (q := quantise(x, b, ue8m0=bool(u)), relative_error(x, q), small_error(x, q))[1:]
            for s, b in SCHEMES.items() for u in ("", ", UE8M0")}
        print(f"{name:16s}" + "".join(f"{f'{a:.4f} / {b:.4f}':>22s}" for a, b in row.values()))
        figures |= {f"error {name}, {s}": a for s, (a, _) in row.items()} | {f"small error {name}, {s}": b
            for s, (_, b) in row.items()}
    return figures


def products():
    "calc_diff of DeepGEMM and the reference, per form of the product."
    from moe_rl.fp8.gemm import calc_diff, gemm
    from moe_rl.fp8.kernels import cast_blocks, cast_rows
    g = torch.Generator("cuda").manual_seed(0)
    x = lambda *s: (torch.randn(*s, generator=g, device="cuda")*torch.randn(*s[:-1], 1, generator=g,
        device="cuda").exp()).bfloat16()
    ints = lambda v: torch.tensor(v, device="cuda", dtype=torch.int32)
    both = lambda a, b, form="dense", groups=None: (gemm(a, b, form, groups, "deep_gemm"), gemm(a, b, form, groups))
    out = {}
    for M, N, K in ((64, 2112, 7168), (4096, 4096, 7168), (128, 512, 1024), (33, 128, 128)):
        out[f"dense {M}x{N}x{K}"] = calc_diff(*both(cast_rows(x(M, K)), cast_blocks(x(N, K))))
    out["dense, weight gradient"] = calc_diff(*both(cast_rows(x(512, 4096)), cast_rows(x(768, 4096))))
    for E, N, K in ((4, 4096, 7168), (8, 2048, 768)):
        counts = torch.randint(0, 5, (E,), generator=g, device="cuda").tolist()
        groups = ints(sum([[e]*128*n for e, n in enumerate(counts)], []) + [-1]*128)
        live = groups >= 0
        y, z = both(cast_rows(x(len(groups), K)), cast_blocks(x(E, N, K)), "contiguous", groups)
        out[f"grouped contiguous {E}x{N}x{K}"] = calc_diff(y[live], z[live])
        n = [256, 0, 3, 128, 77, 1, 255, 40][:E]
        y, z = both(quantise(x(E, 256, K)), cast_blocks(x(E, N, K)), "masked", ints(n))
        out[f"grouped masked {E}x{N}x{K}"] = max(calc_diff(y[e,:m], z[e,:m]) for e, m in enumerate(n) if m)
    sizes = [256, 0, 128, 1024, 384, 0, 512, 128]
    y, z = both(cast_rows(x(512, sum(sizes)+256)), cast_rows(x(768, sum(sizes)+256)), "k_grouped", ints(sizes))
    out["k-grouped 8x512x768"] = calc_diff(y, z)
    return out


def measure(args):
    figures = table()
    needs_hopper(" for gemm_calc_diff")
    if importlib.util.find_spec("deep_gemm") is None:
        raise NeedsHardware("DeepGEMM for gemm_calc_diff (pip install 'moe_rl[cuda]')")
    diffs = products()
    for name, d in diffs.items(): print(f"{name:36s} {d:.2e}")
    return dict(figures=dict(gemm_calc_diff=max(diffs.values()), **diffs, **figures))
