"Environments: held-out problems by text, mixtures, guarded calls, conversations in tokens."
import asyncio, subprocess, sys, time
from types import SimpleNamespace
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
import moe_rl.rollout.environments as environments
from moe_rl.errors import UserError
from moe_rl.data.tokens import byte_tokenizer, says as message
from moe_rl.rollout.environments import (
    Calculator, Environment, Mixture, ReasoningGym, Task, calculate, choose, load_env, load_envs, text_hash)
from moe_rl.rollout.episode import play
from moe_rl.rollout.guard import EnvError, Guard, RolloutLost


class Words(Environment):
    "A finite list of problems, so that training repeats them."
    def __init__(self, size=400, share=0.2, name="words", seed=0):
        self.size, self.held_out_share, self.name, self.seed = size, share, name, seed
    def problem(self, key):
        return Task(env=self.name, prompt=f"{self.name} {key % self.size}", answer=str(key % self.size))


class Faulty(Words):
    "Does what the model's last text says."
    def score(self, task, turns): return getattr(self, turns[-1])()
    def fine(self): return 1.0
    def crash(self): raise RuntimeError("two\nlines")
    def nan(self): return float("nan")
    def infinite(self): return float("inf")
    def nothing(self): return None
    def exit(self): sys.exit(1)
    def block(self): time.sleep(60)
    async def wait(self): await asyncio.sleep(60)


TOK = byte_tokenizer()

def says(*turns, stop="stop", routes=True):
    "An engine that says `turns`."
    async def generate(tokens, turn):
        ids = TOK.encode(turns[turn]) + ([TOK.eos_id] if stop == "stop" else [])
        n = len(tokens) + len(ids) - 1
        return SimpleNamespace(token_ids=ids, logprobs=[-0.25]*len(ids), versions=[turn]*len(ids), stop_reason=stop,
                               routes=np.tile(np.array([turn, turn+1], np.uint8), (n, 3, 1)) if routes else None)
    return generate


# ---- held out by text

def overlap(env, n_train=2000, n_test=30):
    train = {env.sample(i).prompt for i in range(n_train)} | {p for p, _ in env.train_examples(200)}
    return train & {t.prompt for t in env.held_out(n_test)}

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**9), st.integers(300, 5000))
def test_training_and_held_out_texts_are_disjoint(seed, size):
    assert not overlap(Words(size=size, seed=seed), 500)

def test_disjointness_check_catches_a_test_set_chosen_by_seed(monkeypatch):
    assert not overlap(Words())
    monkeypatch.setattr(environments, "held_out_tasks", lambda env, n: [env.problem(environments.mix("another seed",
        i)) for i in range(n)])
    assert overlap(Words())

def test_held_out_is_distinct_and_the_same_for_every_seed_and_length():
    a, b = [t.prompt for t in Words(seed=0).held_out(40)], [t.prompt for t in Words(seed=9).held_out(60)]
    assert len(set(b)) == 60 and b[:40] == a

def test_text_hash_never_changes():
    assert text_hash("abc") == pytest.approx(0.07729014664450418) and text_hash("") != text_hash(" ")
    code = "from moe_rl.rollout.environments import text_hash, mix; print(text_hash('abc'), mix(0, 'a', 1))"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
        env=dict(PYTHONHASHSEED=s, PATH="")).stdout for s in ("1", "2")}
    assert runs == {f"{text_hash('abc')} {environments.mix(0, 'a', 1)}\n"}

def test_too_few_problems_is_one_clear_line():
    with pytest.raises(UserError, match="words: only [0-9]+ distinct held-out prompts"): Words(size=20).held_out(50)
    with pytest.raises(UserError, match="too few problems to train on"): Words(share=1.).sample(0)

def test_spell_backward_has_512_held_out_words():
    env = load_env("spell_backward")
    held = env.held_out(512)
    assert len({t.prompt for t in held}) == 512 and all(t.answer == t.data["metadata"]["word"][::-1] for t in held)
    assert not {t.prompt for t in held} & {env.sample(i).prompt for i in range(2000)}


# ---- reasoning-gym

@pytest.mark.parametrize("name", ["spell_backward", "chain_sum", "gcd", "letter_counting", "base_conversion",
    "word_ladder", "gsm_symbolic", "list_functions", "mini_sudoku", "countdown"])
def test_any_task_by_name(name):
    env = load_env(name, seed=3)
    a, b = env.sample(0), env.sample(1)
    assert a.prompt != b.prompt and env.sample(0).prompt == a.prompt and load_env(name,
        seed=4).sample(0).prompt != a.prompt
    if a.answer is not None: assert asyncio.run(env.score(a, [f" {a.answer}\n"])) == 1.0

def test_near_seeds_share_no_items():
    env = ReasoningGym("spell_backward")
    a, b = [{env.problem(environments.mix(s, i)).prompt for i in range(300)} for s in (1, 2)]
    assert len(a & b) < 5

def test_answer_tag():
    env = load_env(dict(name="gcd", params=dict(answer_tag="answer")))
    t = env.sample(0)
    assert asyncio.run(env.score(t, [f"so <answer>{t.answer}</answer>"])) == 1.0 and asyncio.run(env.score(t,
        [t.answer])) == 0.0

@pytest.mark.parametrize("section, message", [
    ("spell_backwards", "did you mean 'spell_backward'"), ("zzzz", "module:attribute"),
    (dict(name="gcd", params=dict(bogus=1)), "no setting 'bogus'"),
    (dict(name="spell_backward", params=dict(min_word_len=9, max_word_len=3)), "settings refused"),
    ("nowhere:Env", "cannot be imported"),
    ("collections:OrderedDict", "has no problem"), (dict(name="calculator", params=dict(x=1)), None)])
def test_bad_sections_are_user_errors(section, message):
    with pytest.raises((UserError, TypeError), match=message) as e: load_env(section)
    assert "\n" not in str(e.value)

def test_own_environment_by_import_path(tmp_path, monkeypatch):
    (tmp_path/"my_env.py").write_text("from moe_rl.rollout.environments import Environment, Task\n"
        "class Mine(Environment):\n    name = 'mine'\n    def __init__(self, n=1000): self.n = n\n    def "
        "problem(self, key): return Task(env='mine', prompt=f'{key % self.n}?', answer='!')\n")
    monkeypatch.syspath_prepend(tmp_path)
    mix = load_envs([dict(name="my_env:Mine", weight=2., params=dict(n=5000)), dict(name="calculator", weight=1.)],
        seed=1)
    assert {t.env for t in map(mix.sample, range(20))} == {"mine", "calculator"}


# ---- mixtures

@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.05, 10), min_size=1, max_size=6), st.integers(0, 10**7))
def test_mixture_shares_hold_in_every_stretch(weights, start):
    n = 400
    counts = np.bincount([choose(i, weights) for i in range(start, start+n)], minlength=len(weights))
    assert np.abs(counts - n*np.array(weights)/sum(weights)).max() <= 6

def test_mixture_is_deterministic_and_dispatches():
    mix = Mixture([Words(name="a"), Calculator()], [0.7, 0.3])
    first = [mix.sample(i) for i in range(50)]
    assert [mix.sample(i) for i in reversed(range(50))] == first[::-1]
    assert len(mix.held_out(64)) == 64 and sum(t.env == "a" for t in mix.held_out(64)) == 45
    assert all(asyncio.run(mix.score(t, [t.answer])) == 1.0 for t in first[:10])
    assert not overlap(mix)


# ---- failures stay small

@pytest.mark.parametrize("fault, reason", [("crash", "env_error"), ("exit", "env_error"), ("missing", "env_error"),
                                           ("nan", "env_reward"), ("infinite", "env_reward"),
                                           ("nothing", "env_reward"), ("block", "env_timeout"),
                                           ("wait", "env_timeout")])
def test_a_failure_costs_its_own_rollout_and_is_counted(fault, reason):
    async def main():
        guard = Guard(Faulty(), timeout=0.5)
        task = guard.env.sample(0)
        one = lambda text, i: play(guard, task, TOK, says(text), 0, i)
        got = await asyncio.gather(*[one(fault if i == 1 else "fine", i) for i in range(4)], return_exceptions=True)
        assert isinstance(got[1], EnvError) and got[1].reason == reason and "\n" not in str(
            got[1]) and "words: score" in str(got[1])
        assert [got[i].reward for i in (0, 2, 3)] == [1.0]*3 and dict(guard.failures) == {reason: 1}
    asyncio.run(main())

def test_a_generator_that_fails_is_an_env_error_too():
    class Broken(Words):
        def problem(self, key): raise KeyError("no data file")
    with pytest.raises(EnvError, match="sample.3. failed: KeyError"): asyncio.run(Guard(Broken()).sample(3))

def test_known_failure_32_an_evaluation_waits_for_no_call_of_training():
    async def main(judge_of):
        guard = Guard(Faulty(), timeout=5., width=2)
        hanging = [asyncio.create_task(guard.score(guard.env.sample(0), ["block"])) for _ in range(6)]
        await asyncio.sleep(.1)
        try: return await asyncio.wait_for(judge_of(guard).score(guard.env.sample(0), ["fine"]), 1)
        finally:
            for h in hanging: h.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)
    assert asyncio.run(main(lambda guard: guard.beside())) == 1.0
    with pytest.raises(TimeoutError): asyncio.run(main(lambda guard: guard))

def test_hanging_calls_do_not_delay_the_end_of_the_process():
    code = ("import asyncio, time\nfrom moe_rl.rollout.environments import Environment, Task\nfrom "
            "moe_rl.rollout.guard import EnvError, Guard\n"
            "class Hangs(Environment):\n    def problem(self, key): time.sleep(600)\n"
            "async def main():\n    try: await Guard(Hangs(), timeout=.1).sample(0)\n    except EnvError as e: "
            "print(e.reason)\nasyncio.run(main())")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
        timeout=60).stdout == "env_timeout\n"


# ---- conversations in tokens

@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=5), st.integers(1, 5))
def test_sampled_text_is_never_tokenised_again_and_tool_text_never_trained(texts, max_turns):
    replies = []
    class Talk(Words):
        def reply(self, task, turns):
            if len(turns)//2 + 1 == len(texts): return None
            replies.append(f"<{turns[-1]}>")
            return replies[-1]
        def score(self, task, turns): return len(turns)
    guard = Guard(Talk())
    task = guard.env.sample(0)
    r = asyncio.run(play(guard, task, TOK, says(*texts), 4, 2, max_turns=max_turns))
    turns = min(len(texts), max_turns)
    sampled = [i for t in texts[:turns] for i in TOK.encode(t) + [TOK.eos_id]]
    assert r.token_ids[r.loss_mask].tolist() == sampled and (r.versions[~r.loss_mask]
        == -1).all() and not r.logprobs[~r.loss_mask].any()
    told = TOK.render(task.opening) + [i for t in replies[:turns-1] for i in TOK.render_next(message(t))]
    assert r.token_ids[~r.loss_mask].tolist() == told and r.turns == turns and r.reward == 2*turns-1
    assert r.stop_reason == ("turns" if turns < len(texts) else "stop") and len(r.routes) == len(r)-1

def test_routes_of_a_turn_come_from_the_turn_that_read_the_token():
    guard = Guard(Calculator())
    t = guard.env.sample(0)
    r = asyncio.run(play(guard, t, TOK, says("= 1+1", t.answer), 0, 0, max_turns=3))
    seam = int(np.flatnonzero(r.versions == 0)[-1])
    assert set(r.routes[:seam, 0, 0]) == {0} and set(r.routes[seam:, 0, 0]) == {1}

def test_truncated_and_aborted_answers():
    guard = Guard(Calculator())
    t = guard.env.sample(0)
    r = asyncio.run(play(guard, t, TOK, says("= 1+", stop="length"), 0, 0, max_turns=3))
    assert r.stop_reason == "length" and r.turns == 1 and TOK.eos_id not in r.token_ids.tolist()
    with pytest.raises(RolloutLost) as e: asyncio.run(play(guard, t, TOK, says("x", stop="aborted"), 0, 0))
    assert e.value.reason == "aborted"
    assert asyncio.run(play(guard, t, TOK, says("x", routes=False), 0, 0)).routes is None

def test_exact_reward_setting():
    env = load_env("spell_backward")
    t = env.sample(0)
    wrong = t.answer[:-1] + "#"
    assert asyncio.run(Guard(env, reward="score").score(t, [wrong])) > 0 == asyncio.run(Guard(env,
        reward="exact").score(t, [wrong]))
    with pytest.raises(UserError, match="rl.reward"): Guard(env, reward="f1")

atoms = st.integers(0, 99).map(str)
expressions = st.recursive(atoms, lambda e: st.one_of(st.tuples(e, st.sampled_from("+-*"), e).map("".join),
    e.map("({})".format), e.map("-{}".format)), max_leaves=12)

@given(expressions.filter(lambda e: len(e) <= 64))
def test_calculator_agrees_with_python(expression): assert calculate(expression) == str(eval(expression))

@given(st.text(max_size=80) | st.text("0123456789+-*() ", max_size=80))
def test_calculator_survives_any_text(text):
    assert calculate(text) == "error" or str(int(calculate(text))) == calculate(text)

def test_an_exit_in_one_call_does_not_fall_on_the_next():
    async def main():
        guard = Guard(Faulty(), timeout=5., width=1)
        got = await asyncio.gather(*[guard.score(guard.env.sample(0), [f]) for f in ("exit", "fine")*20],
            return_exceptions=True)
        assert [getattr(g, "reason", g) for g in got] == ["env_error", 1.0]*20
    asyncio.run(main())
