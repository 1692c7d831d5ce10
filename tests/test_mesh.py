"""Many ranks against one: what shipped wrong elsewhere, and for each the mistake put in and seen to fail."""
import pytest
import torch

from moe_rl.config import BalanceSection
from moe_rl.data.batch import packed_batches
from moe_rl.ep.ranks import ExchangeError, run_ranks
from moe_rl.moe.experts import grouped_experts
from moe_rl.moe.families import new_afmoe
from moe_rl.moe.model import Model, init_weights, moe_modules
from moe_rl.records import Example
from moe_rl.scale import distcheckpoint, parallel
from moe_rl.scale.distcheckpoint import Saver, restore
from moe_rl.scale.parallel import Layout, forget, parallelise
from moe_rl.train import step
from moe_rl.train.checkpoint import latest
from moe_rl.train.optim import Optimizers
from moe_rl.train.sft import sft_loss

SPEC = new_afmoe(vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=3,
    num_dense_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=8,
    num_experts_per_tok=2, sliding_window=8)
BALANCE = BalanceSection(rule="smebu", rate=.1, aux_coef=1e-2)


def examples(n):
    g = torch.Generator().manual_seed(0)
    return [Example(token_ids=torch.randint(64, (9+i,), generator=g).int().numpy(), loss_mask=[0]+[1]*(8+i), id=str(i))
        for i in range(n)]


def sgd(model, parameters):
    "An optimizer that shows the size of a gradient, as AdamW and Muon do not."
    opt = torch.optim.SGD(list(parameters.values()), 1.)
    return Optimizers(None, opt, {p: n for n, p in parameters.items()})


def one_step(layout, again="none", texts=6, mistake=None, folder=None):
    "Loss, norm, counts, expert biases and weights after a step whose gradient is clipped; and after a checkpoint."
    if mistake: mistake()
    model = init_weights(Model(SPEC, grouped_experts), 0)
    mesh = parallelise(model, layout, again=again)
    if layout.ranks == 1: forget(model, again)
    opt = sgd(model, mesh.parameters(model))
    batches = packed_batches(examples(texts), 32, ranks=layout.data)
    loss = lambda model, b: sft_loss(model, b, BALANCE)
    r = step.optimizer_step(model, opt, batches, loss, BALANCE, .05, mesh)
    if folder:
        saver = Saver(folder, mesh)
        saver.begin(1, model, opt)
        saver.finish()
        fresh = init_weights(Model(SPEC, grouped_experts), 1)
        mesh = parallelise(fresh, layout)
        restore(latest(folder), fresh, sgd(fresh, mesh.parameters(fresh)), mesh)
        model = fresh
    biases = [t.clone() for m in moe_modules(model) for t in (m.expert_bias, m.bias_momentum)]
    return r.loss, r.grad_norm, r.counts, biases, mesh.gather({n: p.detach() for n, p in model.named_parameters()})


def same(got, want):
    assert abs(got[0]/want[0]-1) < 5e-7, "loss"
    assert abs(got[1]/want[1]-1) < 2e-6, "norm"
    assert torch.equal(got[2], want[2]), "counts"
    assert all(t.any() for t in want[3]) and all(map(torch.equal, got[3], want[3])), "biases"
    start = init_weights(Model(SPEC), 0).state_dict()
    for n, t in want[4].items():
        moved = t-start[n]
        assert (got[4][n]-t).norm() <= 1e-4*moved.norm()+1e-12, n


# ---------------------------------------------------------------- the mistakes
def experts_scaled():
    "23: gradients of experts times the number of ranks that share them."
    right = parallel.ParallelMesh.gradients
    def wrong(self, params):
        right(self, params)
        for p in params:
            if p.ndim == 3 and p.grad is not None: p.grad.mul_(self.layout.experts)
    parallel.ParallelMesh.gradients = wrong

def never_balanced(): step.balance_step = lambda *args: None # 24: a bias that is never updated

def not_saved():
    "24: biases and momenta left out of checkpoints."
    right = distcheckpoint.parts_of
    def wrong(model, optimizers, mesh):
        return {n: t for n, t in right(model, optimizers, mesh).items() if "bias" not in n}
    distcheckpoint.parts_of = wrong

def clipped_alone():
    "25: every rank clips by the norm of its own part."
    from moe_rl.train.optim import grad_norm
    parallel.ParallelMesh.norm = lambda self, params: grad_norm(params)

def not_clipped(): step.clip_grads = lambda params, clip, norm_of: norm_of(params) # 25: off without a word

def loss_times_world():
    "26: a sum over ranks of what is a sum already."
    right = parallel.ParallelMesh.sum
    parallel.ParallelMesh.sum = lambda self, x: right(self, right(self, x)) if x.is_floating_point() else right(self, x)

def averaged():
    "Gradients averaged over ranks, though losses are shares of the step."
    right = parallel.ParallelMesh.gradients
    def wrong(self, params):
        right(self, params)
        for p in params: p.grad = None if p.grad is None else p.grad/self.ranks
    parallel.ParallelMesh.gradients = wrong


EP2 = Layout(shard=2, experts=2)

def test_two_ranks_are_one(tmp_path):
    want = one_step(Layout())
    for got in run_ranks(one_step, 2, EP2, "layers", 6, None, str(tmp_path)): same(got, want)

def test_a_rank_without_texts():
    "23: nothing of it becomes NaN, and the others do not notice."
    for got in run_ranks(one_step, 2, EP2, "blocks", 1): same(got, one_step(Layout(), texts=1))

@pytest.mark.parametrize("mistake", [experts_scaled, never_balanced, not_saved, clipped_alone, not_clipped,
    loss_times_world, averaged], ids=lambda f: f.__name__)
def test_mistakes_are_seen(mistake, tmp_path):
    want = one_step(Layout())
    with pytest.raises((AssertionError, ExchangeError, KeyError)):
        for got in run_ranks(one_step, 2, EP2, "layers", 6, mistake, str(tmp_path)): same(got, want)


# ---------------------------------------------------------------- 22: nothing is routed or counted twice
def gradients(again, bias_moves):
    "Counts and gradients of a pass between whose halves the bias changes: who routes again takes other experts."
    model = init_weights(Model(SPEC, grouped_experts), 0)
    forget(model, again)
    b = packed_batches(examples(6), 128)[0][0]
    from moe_rl.data.batch import to_torch
    parts = sft_loss(model, to_torch(b), BALANCE)
    if bias_moves:
        for m in moe_modules(model): m.expert_bias.copy_(torch.randn(8, generator=torch.Generator().manual_seed(1)))
    sum(parts.parts.values()).backward()
    return parts.counts, [p.grad for p in model.parameters()]

@pytest.mark.parametrize("again", ["blocks", "layers"])
def test_computed_again_but_not_routed_again(again):
    (counts, want), (again_counts, got) = gradients("none", False), gradients(again, True)
    assert torch.equal(counts, again_counts)
    assert all(torch.equal(a, b) for a, b in zip(got, want))

def test_routing_again_would_be_seen(monkeypatch):
    def forgetful(self, x, tables, attend, replay, token_mask):
        return parallel.computed_again(lambda x: self.forward(x, tables, attend, replay, token_mask))(x)
    monkeypatch.setattr(parallel._Remembering, "__call__", forgetful)
    want, got = gradients("none", False)[1], gradients("layers", True)[1]
    assert not all(torch.equal(a, b) for a, b in zip(got, want))


# ---------------------------------------------------------------- a rank that dies
def dies():
    import os
    import torch.distributed as dist
    model = init_weights(Model(SPEC, grouped_experts), 0)
    parallelise(model, EP2)
    if dist.get_rank() == 1: os._exit(7)
    b = packed_batches(examples(2), 128)[0][0]
    from moe_rl.data.batch import to_torch
    sft_loss(model, to_torch(b)).parts["answers"].backward()

def test_a_rank_that_dies_is_an_error_on_the_others():
    said = run_ranks(dies, 2, timeout=60., errors=True)
    assert all(isinstance(e, ExchangeError) for e in said)
    assert "rank 1 died without an answer (exit code 7)" in str(said[1])
