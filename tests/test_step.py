"""The fused step against the plain model, objective and optimizers; in Triton's interpreter where there is no GPU."""
from functools import partial
from importlib.util import find_spec

import pytest
import moe_rl.gpu.kernels as kernels  # before anything else imports triton
import torch
from torch import nn

from moe_rl.gpu.fused import fused_experts
from moe_rl.gpu.experts import gpu_experts
from moe_rl.gpu.optimizers import AdamW, Muon, clip_scale
from moe_rl.gpu.step import ATTENTION, FusedModel, documents, plain_backward, plain_forward
from moe_rl.moe.attention import packed_attend, packed_positions
from moe_rl.moe.families import new_afmoe
from moe_rl.moe.model import Model, init_weights
from moe_rl.train.objective import token_logprobs
from moe_rl.train.optim import Muon as PlainMuon

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9 and find_spec("quack") is not None
plain = partial(fused_experts, backend="plain")


def config(**over):
    return new_afmoe(**dict(vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
                              num_hidden_layers=2, num_dense_layers=1, num_attention_heads=2, num_key_value_heads=1,
                              head_dim=8,
                              num_experts=4, num_experts_per_tok=2, global_attn_every_n_layers=2, sliding_window=3,
                              score_func="softmax", route_norm=False, mup_enabled=False) | over)


def test_fused_model_is_the_plain_model_with_routes_replayed_in_part_and_fillers():
    model = init_weights(Model(config()), 1).to(DEVICE)
    g = torch.Generator().manual_seed(0)
    docs, N = documents([5, 3], model), 8
    ids, targets = torch.randint(40, (2, N), generator=g).to(DEVICE)
    mask, weights = torch.arange(N, device=DEVICE) < 7, torch.rand(N, generator=g).to(DEVICE)
    replay = torch.rand(N, 1, 4, generator=g).topk(2, -1).indices
    replay[::2] = -1
    replay = replay.to(DEVICE)
    out = model(ids, packed_positions(docs.cu), packed_attend(docs.cu), replay=replay, token_mask=mask)
    lp, _, lse = token_logprobs(out.hidden, model.lm_head.weight, targets)
    want = (weights*(.01*lse.square()-lp)).sum()
    got = FusedModel(model, plain, "plain").loss(ids, targets, weights, docs, replay=replay, token_mask=mask,
        z_loss=.01)
    assert torch.equal(torch.stack([r.idx for r in got.routings], 1), out.routes)
    assert abs(got.loss-want) <= 1e-6*abs(want) and (got.logprobs-lp).abs().max() < 1e-5
    for (n, p), a, b in zip(model.named_parameters(), *(torch.autograd.grad(l, list(model.parameters()))
            for l in (got.loss, want))):
        assert (a-b).abs().max() <= 2e-5*b.abs().max().clamp(min=1e-6), n


def test_fused_model_without_gates_and_post_norms():
    """Other families leave them out: the pieces then do without, and a part that is added as it is has the gradient
    of the stream."""
    model = init_weights(Model(config()), 1).to(DEVICE)
    docs, ids = documents([6], model), torch.arange(6, device=DEVICE)
    for l in model.layers: del l.self_attn.gate_proj, l.post_attention_layernorm, l.post_mlp_layernorm
    fused = FusedModel(model, plain, "plain")
    loss = lambda: fused.loss(ids, ids, torch.full((6,), 1/6, device=DEVICE), docs).loss
    w = model.layers[0].self_attn.o_proj.weight
    d, = torch.autograd.grad(loss(), w)
    step = .02*d/d.norm()
    with torch.no_grad():
        w += step
        up = loss()
        w -= 2*step
        down = loss()
    assert abs((up-down)/.04 - d.norm()) < .02*d.norm()


def test_groups_of_experts_are_refused():
    with pytest.raises(ValueError, match="knows no groups"):
        FusedModel(Model(config(n_group=2, topk_group=1)), plain, "plain")


def test_a_gradient_that_is_not_finite_moves_nothing():
    ps = [nn.Parameter(torch.ones(2, 4, device=DEVICE)), nn.Parameter(torch.ones(3, device=DEVICE))]
    for p in ps: p.grad = torch.full_like(p, float("inf"))
    for opt in (Muon(ps[:1]), AdamW(ps)):
        opt.scale, norm = clip_scale(ps, 1.)
        opt.step()
        assert not norm.isfinite() and all(torch.equal(p, torch.ones_like(p)) for p in ps) and all(t.isfinite().all()
            for s in opt.state.values() for t in s.values())


def test_muon_moves_masters_that_bf16_could_not_hold():
    start = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    p, q = nn.Parameter(start.to(DEVICE)), nn.Parameter(start.float().to(DEVICE))
    ours, theirs = Muon([p], lr=1e-4), PlainMuon([q], lr=1e-4)
    for i in range(3):
        p.grad = torch.randn(8, 12, generator=torch.Generator().manual_seed(i)).bfloat16().to(DEVICE)
        q.grad = p.grad.float()
        ours.step()
        theirs.step()
    master = ours.state[p]["master"]
    assert (master-q).abs().max() < (1e-6 if DEVICE == "cpu" else 2e-5) and torch.equal(p,
        master.bfloat16()) and not torch.equal(master, start.float().to(DEVICE))


@pytest.mark.parametrize("experts", [plain, gpu_experts], ids=["fused", "triton"])
def test_a_layer_of_experts_compiles_whole(experts):
    "Operators with known shapes: nothing is freed or overwritten that the compiler plans with."
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    moe = init_weights(Model(config(moe_intermediate_size=16)), 0).layers[1].mlp.to(DEVICE, dtype)
    moe.expert_bias = moe.expert_bias.float()
    moe.experts.compute = experts
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype).requires_grad_()
    f = lambda x: moe(x)[0].sin().sum()
    args = [x, *moe.parameters()]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    for a, b in zip(*(torch.autograd.grad(h(x), args) for h in (compiled, f))):
        assert (a-b).norm() <= (1e-5 if DEVICE == "cpu" else 3e-2)*b.norm().clamp(min=1e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="a GPU's attention")
@pytest.mark.parametrize("name", ["torch", pytest.param("flash4",
    marks=pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn-4"))])
@pytest.mark.parametrize("window", [None, 1, 100])
def test_flash_attention_is_the_plain_one(name, window):
    model = init_weights(Model(config()), 1).to(DEVICE)
    docs, g = documents([300, 1, 211], model), torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(512, h, 128, generator=g).to(DEVICE, torch.bfloat16) for h in (8, 2, 2, 8))
    o, lse = ATTENTION[name].forward(q, k, v, docs, window)
    want, wanted_lse = plain_forward(q, k, v, docs, window)
    assert (o.float()-want.float()).norm() <= 1e-2*want.float().norm() and (lse-wanted_lse).abs().max() < 1e-2
    for a, b in zip(ATTENTION[name].backward(do, q, k, v, o, lse, docs, window),
            plain_backward(do, q, k, v, want, wanted_lse, docs, window)):
        assert (a.float()-b.float()).norm() <= 2e-2*b.float().norm().clamp(min=1.)


@pytest.mark.skipif(not HOPPER, reason="fused products need a Hopper GPU with quack-kernels")
def test_newton_schulz_by_quack_is_that_by_torch():
    from moe_rl.gpu.optimizers import newton_schulz
    for shape in ((4, 256, 512), (4, 512, 256), (2, 768, 2048), (3, 192, 320)):
        x = torch.randn(*shape, device="cuda")
        x = (x/x.norm(dim=(1, 2), keepdim=True)).bfloat16()
        a, b = newton_schulz(x, "torch").float(), newton_schulz(x, "quack").float()
        assert (a-b).norm() <= 2e-2*a.norm(), shape
