"""How fast one GPU is at the products that a training step is made of: dense and grouped products, attention, and
plain copies, by shape. The planner turns this table into the efficiency of a kernel class as a function of its shape,
which one peak figure can't give.

moe-rl bench kernel_table --record"""
import gc
from statistics import median

import torch

from moe_rl.bench import NeedsHardware, device_times

DENSE = [(n, k) for n in (512, 1024, 2048, 4096, 8192, 16384) for k in (512, 1024, 2048, 4096, 8192)] + [(6144, 2048),
    (7168, 2048), (2048, 7168), (151936, 2048), (28672, 8192)]
ROWS = (64, 256, 1024, 4096, 16384)
GROUPED = [(e, m, n, k) for e in (8, 32, 128) for m in (64, 256, 1024)
    for n, k in ((1536, 2048), (2048, 768), (4096, 7168), (7168, 2048), (6144, 3072), (3072, 3072))
    if e*(m*(n+k) + n*k) < 6e9]
ATTENTION = [(s, h, kv, d) for s in (1024, 4096, 16384, 65536)
    for h, kv, d in ((16, 8, 128), (32, 4, 128), (32, 8, 128), (64, 8, 64), (64, 4, 128)) if s*h < 2.2e6]


def tflops(f, flops, repeats=12):
    "Median TFLOP/s of a call."
    return round(flops/median(device_times(f, repeats, 4))/1e9, 1)


def dense(m, n, k, fp8=False):
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    if not fp8: return tflops(lambda: x @ w.T, 2*m*n*k)
    x8, w8, one = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    return tflops(lambda: torch._scaled_mm(x8, w8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16,
        use_fast_accum=True), 2*m*n*k)


def grouped(e, m, n, k):
    x = torch.randn(e*m, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(e, k, n, device="cuda", dtype=torch.bfloat16)
    ends = torch.arange(1, e+1, device="cuda", dtype=torch.int32)*m
    return tflops(lambda: torch._grouped_mm(x, w, offs=ends), 2*e*m*n*k)


def attention(s, h, kv, d):
    "Causal attention of one sequence; forward, and backward alone; FLOPs are 2*s*s*h*d and 2.5 times that."
    from torch.nn.attention import SDPBackend, sdpa_kernel
    q, k, v = (torch.randn(1, n, s, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (h, kv, kv))
    f = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=h != kv)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        o = f()
        g = torch.randn_like(o)
        return tflops(f, 2*s*s*h*d), tflops(lambda: torch.autograd.grad(o, (q, k, v), g, retain_graph=True), 5*s*s*h*d)


def copies(mib):
    x, y = (torch.empty(mib << 19, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return round(2*(mib << 20)/median(device_times(lambda: y.copy_(x), 20, 5))/1e9, 3)


def measure(args:list[str])->dict:
    if args: raise SystemExit(f"kernel_table takes no arguments, not {args}")
    if not torch.cuda.is_available(): raise NeedsHardware("a GPU")
    table = dict(dense=[(m, n, k, dense(m, n, k)) for n, k in DENSE for m in ROWS],
        copy=[(s, copies(s)) for s in (1, 4, 16, 64, 256, 1024)])
    if torch.cuda.get_device_capability() >= (8, 9):
        table["dense_fp8"] = [(m, n, k, dense(m, n, k, True)) for n, k in DENSE for m in ROWS]
    gc.collect()
    torch.cuda.empty_cache()
    table["grouped"] = [(*shape, grouped(*shape)) for shape in GROUPED]
    table["attention"] = [(*shape, *attention(*shape)) for shape in ATTENTION]
    best = {name: max(row[-1] for row in rows) for name, rows in table.items()}
    for name, rows in table.items(): print(f"{name}: {len(rows)} shapes, best {best[name]}")
    return dict(figures=dict(dense=best["dense"], grouped=best["grouped"],
        attention=max(r[-2] for r in table["attention"]), copy=best["copy"]), details=table)
