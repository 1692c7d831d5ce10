"The planner and the simulator: counts, exactness, conservation, monotony, refusals, and what the command says."
import json, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from moe_rl.errors import UserError
from moe_rl.moe.spec import count_parameters
from moe_rl.scale.hardware import GPUS, cluster
from moe_rl.scale.loop import Loop, Plan, Workload
from moe_rl.scale.models import FOREIGN, Fields, cache_bytes, load_model
from moe_rl.scale.plan import load_setup, plan, plan_command, read_setup, show_plan, simulate_command
from moe_rl.scale.rollouts import Lengths, Replica, Turn, by_token
from moe_rl.scale.serve import Engine, Pace, decode_terms, engine_memory
from moe_rl.scale.train import Layout, constants, places, stack, trainer_memory, trainer_step

ROOT = Path(__file__).resolve().parents[1]
LITTLE = dict(model="qwen3-30b-a3b", hardware=dict(gpu="h100", nodes=4),
    rollouts=dict(groups_per_step=8, group_size=8, mean=1500., prompt=300., longest=4096))

# ---------------------------------------------------------------- counts
TINY = dict(vocab_size=320, max_position_embeddings=512, rms_norm_eps=1e-6)
MOE = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
FAMILIES = {
    "GptOssForCausalLM": dict(TINY, **MOE, model_type="gpt_oss", intermediate_size=32, num_key_value_heads=2,
        head_dim=16, num_local_experts=8, num_experts_per_tok=2, sliding_window=8),
    "Qwen3ForCausalLM": dict(TINY, **MOE, model_type="qwen3", intermediate_size=96, num_key_value_heads=2, head_dim=16,
        tie_word_embeddings=True),
    "GlmMoeDsaForCausalLM": dict(TINY, **MOE, model_type="glm_moe_dsa", intermediate_size=96, moe_intermediate_size=32,
        first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, q_lora_rank=24,
        kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, index_n_heads=8, index_head_dim=16,
        index_topk=8, num_key_value_heads=4),
    "Qwen3_5MoeForCausalLM": dict(TINY, **MOE, model_type="qwen3_5_moe_text", num_key_value_heads=2, head_dim=16,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32),
}

@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_those_of_transformers(name):
    import torch, transformers
    config, kind = FAMILIES[name], getattr(transformers, name)
    settings_ = {k: v for k, v in config.items() if k != "model_type"}
    if name == "GptOssForCausalLM":
        settings_["rope_parameters"] = dict(rope_type="yarn", rope_theta=1e4, factor=2.,
            original_max_position_embeddings=256)
    with torch.device("meta"): model = kind(kind.config_class(**settings_))
    assert count_parameters(FOREIGN[config["model_type"]](Fields(config)))[0] == sum(p.numel()
        for p in model.parameters())

def test_presets_agree_with_their_sizes():
    published = {"glm-5": 744, "deepseek-v3": 671, "kimi-k2": 1026, "qwen3.5-397b-a17b": 397, "gpt-oss-120b": 117,
        "nemotron-3-ultra": 550, "trinity-large": 398.6, "mixtral-8x7b": 46.7, "deepseek-v4-flash": 284}
    for name, billions in published.items():
        assert abs(count_parameters(load_model(name))[0]/1e9/billions - 1) < .015, name

def test_every_preset_has_a_cost():
    from moe_rl.scale.models import PLANNED, RUNNABLE
    for name in [*PLANNED, *RUNNABLE]:
        spec = load_model(name)
        assert trainer_memory(spec, Layout(64), 8192, stack("prime-rl")).total > 0
        assert decode_terms(spec, Engine(8), cluster("h200", 1), 16, 4000).total > 0
        assert cache_bytes(spec, 2000) > cache_bytes(spec, 1000) > 0

# ---------------------------------------------------------------- the simulated engine
def fast(pace, seqs, kv, events):
    r, done = Replica(pace, seqs, kv), {}
    for t, what in [*events, (float("inf"), None)]:
        while r.due <= t and r.n:
            for turn in r.step(): done[turn.id] = r.at
        if isinstance(what, Turn): r.submit(t, what)
        elif what is not None: r.pause(t, what, 0)
    return done

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(150, 500), st.lists(st.tuples(st.floats(0, 3), st.integers(1, 60),
    st.integers(1, 80)), min_size=1, max_size=25), st.lists(st.tuples(st.floats(.01, 3), st.floats(0, .2)), max_size=2),
       st.sampled_from([0., 1e-6, 1e-4]), st.sampled_from([0., 1e-4]))
def test_from_event_to_event_is_token_by_token(seqs, kv, arrivals, pauses, context, prefill):
    pace = Pace(tuple(.0101 + .0005*b for b in range(seqs+1)), context, prefill)
    events = sorted([(t + i*1e-5, (p, n)) for i, (t, p, n) in enumerate(arrivals)]
        + [(t + .5e-5, s) for t, s in pauses], key=lambda e: e[0])
    make = lambda: [(t, Turn(i, *w) if isinstance(w, tuple) else w) for i, (t, w) in enumerate(events)]
    slow, quick = by_token(pace, seqs, kv, make()), fast(pace, seqs, kv, make())
    assert slow.keys() == quick.keys()
    for i in slow: assert quick[i] == pytest.approx(slow[i], rel=1e-9)

def test_a_conversation_that_never_fits_is_refused():
    with pytest.raises(ValueError, match="does not fit a cache of 100"):
        Replica(Pace((.01,)*9, 0., 0.), 8, 100).submit(0., Turn(0, 60, 50))

# ---------------------------------------------------------------- the loop
def toy(S=1, steps=8, seed=0, turns=1, **more):
    w = Workload(Lengths(400//turns, 2000//turns, .8), Lengths(100, 300, .3), turns, 20. if turns > 1 else 0.,
        1. if turns > 1 else 0., solved=.2)
    pace = Pace(tuple(.012 + 3e-5*b for b in range(65)), 5e-9, 2e-6)
    return Plan(pace, 3, 24, 30_000, w, 8, 4, S, steps, lambda n: 12., 1., seed=seed, **more)

@settings(max_examples=12, deadline=None)
@given(st.integers(0, 3), st.integers(0, 99), st.sampled_from(["keep", "filter"]), st.sampled_from([1, 4]))
def test_tokens_are_trained_dropped_or_wait(S, seed, rule, turns):
    loop = Loop(toy(S, seed=seed, turns=turns, zero_variance=rule))
    steps = loop.run()
    fate = {key: loop.buffer.ledger.name(loop.buffer.ledger.row(key[0])[key[1]]) for key in loop.tokens_of}
    by = {f: sum(n for k, n in loop.tokens_of.items() if fate[k] == f) for f in set(fate.values())}
    assert sum(by.values()) == loop.issued_tokens and by.get("taken", 0) == loop.trained_tokens
    assert max(loop.stale) <= S and len(steps) == 8
    again = Loop(toy(S, seed=seed, turns=turns, zero_variance=rule))
    assert json.dumps([s.__dict__ for s in again.run()]) == json.dumps([s.__dict__ for s in steps])

def test_a_slow_trainer_sees_what_the_gate_allows():
    for S in (1, 2):
        p = replace(toy(S, 12), train=lambda n: 200.)
        assert np.mean([s.staleness for s in Loop(p).run()[S+2:]]) == pytest.approx(S, abs=.05)

def test_a_gate_that_lets_more_through_is_seen(monkeypatch):
    """The simulator calls the very gate of the run: put a mistake in, and staleness passes its bound or groups are
    dropped for it."""
    import moe_rl.scale.loop as module
    true = module.room
    monkeypatch.setattr(module, "room", lambda *a: true(*a) + 2*a[4])
    loop = Loop(replace(toy(1, 10), train=lambda n: 200.))
    loop.run()
    assert loop.buffer.drops["stale"] > 0

# ---------------------------------------------------------------- monotony
GLM = load_model("glm-5")

@settings(max_examples=25, deadline=None)
@given(st.sampled_from([8, 16, 32, 128]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 8, 16, 32]),
    st.floats(20, 400), st.floats(1, 4), st.sampled_from([8192, 65536]))
def test_a_faster_network_is_never_slower(gpus, cp, ep, nic, times, micro):
    l = Layout(gpus, cp=cp, ep=ep)
    if l.check(GLM): return
    a, b = (trainer_step(GLM, l, cluster("h200", gpus//8, nic_gbps=n), stack("prime-rl"), 1e6, micro).seconds
        for n in (nic, nic*times))
    assert b <= a*(1+1e-12)

@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.floats(20e9, 300e9), st.floats(1, 3), st.sampled_from(["bf16", "fp8"]))
def test_more_memory_never_holds_less(tp, hbm, times, precision):
    spec, e = load_model("qwen3-30b-a3b"), Engine(tp, precision=precision)
    small, large = (engine_memory(spec, e, replace(GPUS["h100"], hbm=h))[0] for h in (hbm, hbm*times))
    assert large >= small

@settings(max_examples=30, deadline=None)
@given(st.sampled_from([64, 128, 256, 384]), st.integers(1, 8), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_places_lie_between_one_and_k(experts, k, n):
    assert 1 - 1e-9 <= places(n, experts, k) <= min(n, k) + 1e-9

# ---------------------------------------------------------------- plans
def test_constants_are_what_the_rows_say():
    from moe_rl.bench import load_records
    from moe_rl.scale.calibrate import fit_kernels, fit_megatron, fit_prime, fit_sync, load_rows
    rows, c = load_rows(ROOT/"benchmarks"/"data"/"plan_rows.toml"), constants()
    for name, k in fit_kernels(load_records("kernel_table", ROOT)[0]["details"]).items():
        assert k.share == pytest.approx(c["kernels"][name]["share"], rel=1e-3)
    prime, _ = fit_prime(rows, stack("prime-rl"))
    for n in ("live_moe", "in_flight", "passes", "moe_passes", "attention"):
        assert getattr(prime, n) == pytest.approx(getattr(stack("prime-rl"), n), rel=.02)
    level = fit_megatron(rows, stack("megatron"))[0].level
    for gpu, x in stack("megatron").level.items(): assert level[gpu] == pytest.approx(x, rel=1e-3)
    for name, t in c["sync"].items(): assert fit_sync(rows, name, t)["speed"] == pytest.approx(t["speed"], rel=1e-3)

def test_rows_that_say_too_little_are_refused():
    from moe_rl.scale.calibrate import load_rows, predict
    for r in load_rows(ROOT/"benchmarks"/"data"/"plan_rows.toml"):
        if r["use"] == "INC":
            with pytest.raises(ValueError, match="can't be predicted"): predict(r)

def test_a_plan_names_its_terms_and_its_interval():
    p = plan(read_setup(LITTLE))
    assert p.low < p.step_seconds < p.high and p.trainer_gpus + p.engine_gpus == 32 and p.bottleneck
    text = show_plan(p, why=True)
    for word in ("weights, gradients, moments", "dense products", "fitted, prime-rl", "80 % between", "one more node",
            "default of"):
        assert word in text
    assert p.terms["training"][0][1] > 0 and sum(t[1] for t in p.terms["training"]) == pytest.approx(p.train_seconds,
        rel=1e-6)

def test_more_nodes_are_not_slower():
    from moe_rl.scale.plan import find, setup_cluster
    def best(n):
        s = read_setup(LITTLE | dict(hardware=dict(gpu="h100", nodes=n)))
        return find(s, load_model(s.model), setup_cluster(s))[0][0][0]
    assert best(2)*1.02 > best(4) and best(4)*1.02 > best(8)

@pytest.mark.parametrize("change, said", [
    (dict(model="gpt-9"), "model 'gpt-9' is unknown"), (dict(hardware=dict(gpu="h101")), "choose one of a100"),
    (dict(hardware=dict(gpu="h100", price=-1.)), "hardware.price"),
    (dict(hardware=dict(gpu="h100", nodes=0)), "hardware.nodes"),
    (dict(rollouts=dict(mean=1000., longest=400_000)), "was made for 40960 tokens"),
    (dict(rollouts=dict(mean=5000., longest=4096)), "are more than rollouts.longest"),
    (dict(trainer=dict(gpus=32)), "leaves no engine"),
    (dict(trainer=dict(stack="jax")), "stack 'jax' is unknown"),
    (dict(engines=dict(transport="pigeon")), "'pigeon' is unknown"), (dict(wheels=4), "unknown field `wheels`"),
    (dict(hardware=dict(gpu="h100", nodes=1, gpus_per_node=1)), "one GPU"),
    (dict(model="glm-5"), "nodes would do"), (dict(trainer=dict(cp=3, gpus=16)), "no layout divides")])
def test_a_mistake_is_one_line(change, said):
    with pytest.raises(UserError) as e: plan(read_setup(LITTLE | change))
    assert said in str(e.value) and "\n" not in str(e.value), str(e.value)

@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT/"configs").glob("plan_*.toml")))
def test_examples_are_valid(name): load_setup(ROOT/"configs"/name)

def test_commands():
    path = str(ROOT/"configs"/"plan_node.toml")
    out = json.loads(plan_command([path, "--json"]))
    assert out["step_seconds"] > 0 and out["terms"]["decode step"]
    assert "staleness" in simulate_command([path, "--steps", "4"])
    for args, said in (([], "give a setup"), ([path, "--fast"], "'--fast' is not understood"),
            ([path, "--steps", "x"], "--steps: invalid int"), (["nowhere.toml"], "no such setup")):
        with pytest.raises(UserError, match=said): simulate_command(args)

def test_no_torch_and_exit_code_two():
    code = "import sys, moe_rl.scale.plan, moe_rl.scale.calibrate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    r = subprocess.run([sys.executable, "-m", "moe_rl.cli", "plan", "nowhere.toml"], cwd=ROOT, capture_output=True,
        text=True)
    assert r.returncode == 2 and r.stderr.count("\n") == 1 and "no such setup" in r.stderr
