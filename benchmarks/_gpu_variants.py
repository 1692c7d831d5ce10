import torch, triton, triton.language as tl
from moe_rl.fp8.kernels import _bits, _scale, _scales, E4M3, TILE, Quantised
from moe_rl.moe.kernels import on_device

@triton.jit
def _cast_both2(x_ptr, q_ptr, s_ptr, qt_ptr, st_ptr, M, K, MP, stride, stride_t, TILE:tl.constexpr, CHUNK:tl.constexpr):
    k = tl.program_id(0).to(tl.int64)*TILE + tl.arange(0, TILE)
    top = tl.zeros([TILE], tl.int32)
    for c in tl.static_range(0, TILE, CHUNK):
        m = tl.program_id(1).to(tl.int64)*TILE + c + tl.arange(0, CHUNK)
        at, inside = m[:,None]*K + k[None,:], (m < M)[:,None] & (k < K)[None,:]
        x = tl.load(x_ptr+at, mask=inside, other=0.).to(tl.float32)
        bits = _bits(x)
        top = tl.maximum(top, tl.max(bits, 0))
        sf = _scale(tl.max(bits, 1), False)
        tl.store(q_ptr+at, (x*tl.div_rn(1., sf)[:,None]).to(tl.float8e4nv), mask=inside)
        tl.store(s_ptr + tl.program_id(0).to(tl.int64)*stride + m, sf, mask=m < M)
    st = _scale(top, False)
    tl.store(st_ptr + tl.program_id(1).to(tl.int64)*stride_t + k, st, mask=k < K)
    inv = tl.div_rn(1., st)
    for c in tl.static_range(0, TILE, CHUNK):
        m = tl.program_id(1).to(tl.int64)*TILE + c + tl.arange(0, CHUNK)
        at, inside = m[:,None]*K + k[None,:], (m < M)[:,None] & (k < K)[None,:]
        x = tl.load(x_ptr+at, mask=inside, other=0.).to(tl.float32)
        qt = (x*inv[None,:]).to(tl.float8e4nv)
        tl.store(qt_ptr + k[:,None]*MP + m[None,:], tl.trans(qt), mask=(k < K)[:,None])

def cast_both2(x, CHUNK=32, num_warps=4, maxnreg=None):
    M, K = x.shape
    tiles, tiles_m = triton.cdiv(K, TILE), triton.cdiv(M, TILE)
    q, s = torch.empty(M, K, dtype=E4M3, device=x.device), _scales(tiles, M, x.device)
    qt, st = torch.empty(K, tiles_m*TILE, dtype=E4M3, device=x.device), _scales(tiles_m, K, x.device)
    kw = dict(maxnreg=maxnreg) if maxnreg else {}
    _cast_both2[(tiles, tiles_m)](x, q, s, qt, st, M, K, tiles_m*TILE, s.stride(1), st.stride(1), TILE=TILE, CHUNK=CHUNK, num_warps=num_warps, **kw)
    return Quantised(q, s), Quantised(qt, st)

@triton.jit
def _cast_blocks2(w_ptr, q_ptr, s_ptr, qt_ptr, N, K, TILE:tl.constexpr, CHUNK:tl.constexpr, TRANSPOSE:tl.constexpr):
    e = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0).to(tl.int64)*TILE + tl.arange(0, TILE)
    top = tl.zeros([CHUNK, TILE], tl.int32)
    for c in tl.static_range(0, TILE, CHUNK):
        n = tl.program_id(1).to(tl.int64)*TILE + c + tl.arange(0, CHUNK)
        at, inside = e*N*K + n[:,None]*K + k[None,:], (n < N)[:,None] & (k < K)[None,:]
        top = tl.maximum(top, _bits(tl.load(w_ptr+at, mask=inside, other=0.).to(tl.float32)))
    sf = _scale(tl.max(tl.max(top, 1), 0), False)
    tl.store(s_ptr + (e*tl.num_programs(1) + tl.program_id(1))*tl.num_programs(0) + tl.program_id(0), sf)
    inv = tl.div_rn(1., sf)
    for c in tl.static_range(0, TILE, CHUNK):
        n = tl.program_id(1).to(tl.int64)*TILE + c + tl.arange(0, CHUNK)
        at, inside = e*N*K + n[:,None]*K + k[None,:], (n < N)[:,None] & (k < K)[None,:]
        q = (tl.load(w_ptr+at, mask=inside, other=0.).to(tl.float32)*inv).to(tl.float8e4nv)
        tl.store(q_ptr+at, q, mask=inside)
        if TRANSPOSE: tl.store(qt_ptr + e*N*K + k[:,None]*N + n[None,:], tl.trans(q), mask=(k < K)[:,None] & (n < N)[None,:])

def cast_blocks2(w, transpose=False, CHUNK=32, num_warps=4, maxnreg=None):
    (N, K), E = w.shape[-2:], w.shape[:-2].numel()
    tn, tk = triton.cdiv(N, TILE), triton.cdiv(K, TILE)
    q, s = torch.empty(w.shape, dtype=E4M3, device=w.device), torch.empty(*w.shape[:-2], tn, tk, dtype=torch.float32, device=w.device)
    qt = torch.empty(*w.shape[:-2], K, N, dtype=E4M3, device=w.device) if transpose else q
    kw = dict(maxnreg=maxnreg) if maxnreg else {}
    _cast_blocks2[(tk, tn, E)](w, q, s, qt, N, K, TILE=TILE, CHUNK=CHUNK, TRANSPOSE=transpose, num_warps=num_warps, **kw)
    out = Quantised(q, s, (TILE, TILE))
    return (out, Quantised(qt, s.mT.contiguous(), (TILE, TILE))) if transpose else out
