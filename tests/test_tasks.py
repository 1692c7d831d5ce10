"Any task by name: profiles within a bound, sizes that follow, and mixtures in which every environment has its share."
import asyncio, math, time
import numpy as np
import pytest
from test_lifecycle import Letters, make_loop, play
from moe_rl.config import load_settings
from moe_rl.data.tokens import byte_tokenizer
from moe_rl.errors import UserError
from moe_rl.rl import shares as mixture
from moe_rl.rl.log import audit, issued, read_lines
from moe_rl.rl.verdict import course_of, verdict
from moe_rl.rollout.environments import Environment, Mixture, Task, is_held_out
from moe_rl.rollout.guard import Guard
from moe_rl.rollout.profile import answer_limit, draw_profile, fit, own_list, recall, warnings


class Numbers(Environment):
    "Problems of a given supply, length and slowness."
    name = "numbers"
    def __init__(self, supply=10**6, length=1, answer="7", seconds=0.):
        self.supply, self.length, self.answer, self.seconds = supply, length, answer, seconds
    def problem(self, key):
        time.sleep(self.seconds)
        return Task(env=self.name, prompt=f"{key % self.supply} "*(1 + key % self.length), answer=self.answer)


# ---- profiles

def test_a_profile_is_of_both_sides_and_of_nothing_else():
    p = draw_profile(Numbers())
    assert len(p.held_out) == 512 and p.share == 1/16 and len({t.prompt for t in p.held_out}) == 512
    assert all(is_held_out(t.prompt, p.share) for t in p.held_out) and not any(is_held_out(t.prompt, p.share)
        for t in p.tasks)
    assert recall(Numbers(), p.numbers) == p.held_out


def test_a_slow_task_is_drawn_for_a_bounded_time_and_holds_out_more():
    began = time.monotonic()
    p = draw_profile(Numbers(seconds=.02), seconds=.5)
    assert time.monotonic() - began < 6 and 4 <= len(p.held_out) < 512 and p.share > 1/16 and p.seconds >= .02


@pytest.mark.parametrize("supply", [12, 90, 900])
def test_a_small_supply_gives_what_it_has(supply):
    p = draw_profile(Numbers(supply=supply), wanted=512)
    assert p.share == (1/3 if supply < 900 else 1/4) and 0 < len(p.held_out) <= supply/3*1.5 and p.drawn < 40_000


def test_a_share_that_was_given_is_kept():
    env = Numbers(supply=900)
    env.held_out_share = .5
    assert draw_profile(env, 16).share == .5 and draw_profile(Numbers(supply=900), 16, share=.1).share == .1


def test_one_text_is_refused_by_name():
    with pytest.raises(UserError, match="numbers: [0-9]+ draws gave 1 different prompts"):
        draw_profile(Numbers(supply=1))


class Listed(Numbers):
    def held_out(self, n): return [Task(env=self.name, prompt=f"exam {i}", answer="1") for i in range(min(n, 20))]

def test_a_list_of_its_own_is_taken():
    p = draw_profile(Listed(), 512)
    assert own_list(Listed()) and len(p.held_out) == 20 and recall(Listed(), p.numbers) == p.held_out


# ---- sizes

def fitted(env, **overrides):
    p, tok = draw_profile(env, 32), byte_tokenizer()
    s, sizes = fit(load_settings(overrides={k.replace("__", "."): v for k, v in overrides.items()}), [p], tok)
    return s, p, sizes[0]

def test_long_answers_and_prompts_get_room():
    s, p, size = fitted(Numbers(answer="7"*100))
    assert s.engine.max_tokens >= 101 and warnings(s, p, size, 2048) == []
    s, p, size = fitted(Numbers(supply=10**18, length=200))
    assert s.model.max_position_embeddings > 2048 and s.rl.tokens_per_batch >= size.prompts.max() + s.engine.max_tokens - 1 and s.rl.groups_per_step == 8
    assert s.engine.kv_tokens >= size.prompts.max() + s.engine.max_tokens


def test_what_is_given_is_obeyed_and_objected_to():
    s, p, size = fitted(Numbers(answer="7"*100), engine__max_tokens=24, eval__prompts=5, rl__groups_per_step=3,
        schedule__env_timeout=2.)
    assert (s.engine.max_tokens, s.eval.prompts, s.rl.groups_per_step, s.schedule.env_timeout) == (24, 5, 3, 2.)
    assert "only 0 % of the reference answers fit engine.max_tokens = 24" in warnings(s, p, size, 2048)[0]


def test_without_answers_there_is_no_warm_start():
    s, p, size = fitted(Numbers(answer=None))
    assert (s.warm_start.seconds, s.warm_start.steps, s.engine.max_tokens) == (0, 0, 64) and len(size.answers) == 0
    assert "without reference answers there is no warm start" in warnings(s, p, size, 2048)[0]


def test_a_few_giants_do_not_rule():
    assert answer_limit(np.array([9]*990 + [900]*10)) == 12 and answer_limit(np.array([9]*900 + [900]*100)) > 900


# ---- rewards

class Halfway(Numbers):
    def score(self, task, turns): return .5 if turns[-1] != task.answer else 1.

def test_the_automatic_reward():
    """The mean of score and exact match; the exact match alone once the warm start gets some right; the score
    without an answer."""
    async def rewards(env, sharp=()):
        guard = Guard(env, reward="auto")
        guard.sharp |= set(sharp)
        return [await guard.score(env.problem(1), [text]) for text in ("7", "x")]
    assert asyncio.run(rewards(Halfway())) == [1., .25] and asyncio.run(rewards(Halfway(), ["numbers"])) == [1., 0.]
    assert asyncio.run(rewards(Halfway(answer=None))) == [.5, .5]


# ---- mixtures

class Rare(Letters):
    "Only one group in three has answers that differ."
    name = "rare"
    def score(self, task, turns):
        self.count += 1
        return float(self.count % 2) if int(task.prompt.split()[1][:-1]) % 3 == 0 else 0.

def shares(folder, *parts, weights, steps=40):
    loop, last = play(folder, Mixture(list(parts), weights), rl__steps=steps, rl__groups_per_step=4,
        rl__zero_variance="filter", rl__patience=10**6)
    rows = read_lines(folder/"metrics.jsonl")
    trained = {e: sum(r[f"{e}/trained"] for r in rows) for e in loop.shares.weights}
    return {e: n/sum(trained.values()) for e, n in trained.items()}, rows, last

@pytest.mark.parametrize("bug", [False, True])
def test_every_environment_has_its_share_of_what_is_trained(tmp_path, monkeypatch, bug):
    "Bug: groups are issued by the weights, and what survives is what is trained."
    if bug:
        def in_turn(self, st, waiting):
            st.next_group += 1
            return st.next_group - 1
        monkeypatch.setattr(mixture.Shares, "next", in_turn)
        monkeypatch.setattr(mixture, "in_shares", lambda groups, weights, trained: groups)
    got, rows, last = shares(tmp_path, Letters(), Rare(), weights=[.5, .5])
    assert (got["rare"] < .35) if bug else (.4 < got["rare"] < .6), got
    assert set(last["envs"]) == {"letters",
        "rare"} and last["envs"]["rare"]["prompts"] + last["envs"]["letters"]["prompts"] == last["prompts"]
    # of the whole run: a single step may be all letters
    played = {e: sum(r[f"{e}/played"] for r in rows) for e in got}
    assert played["rare"] > played["letters"] or bug, played


def test_the_books_of_a_mixture(tmp_path):
    "Numbers below the highest one that were never asked for are not lost."
    loop, _ = play(tmp_path, Mixture([Letters(), Rare()], [.5, .5]), rl__steps=12, rl__groups_per_step=4,
        rl__zero_variance="filter", rl__patience=10**6)
    st, buffer, size = loop.state, loop.buffer, loop.s.rl.group_size
    waiting = {r.id for rs in buffer.members.values() for r in rs} | {r.id for g in buffer.complete.values()
        for r in g.rollouts} | {f"{g}-{i}" for g, live in st.live.items() for i in live}
    waiting |= {id for ids in buffer.ledger.news.values() for id in ids}     # dropped since the last line
    ledger = read_lines(tmp_path/"ledger.jsonl")
    every = issued(st.next_group, size, st.cursors, loop.guard.pick)
    assert audit(ledger, every, waiting) == dict(duplicated=[], lost=[], invented=[])
    assert len(every) < len(issued(st.next_group, size)) and audit(ledger, issued(st.next_group, size), waiting)["lost"]


def test_a_hopeless_environment_does_not_stop_the_others(tmp_path):
    got, rows, _ = shares(tmp_path, Letters(), Letters(same=True), weights=[.7, .3], steps=12)
    assert got == {"letters": 1., "letters-2": 0.} and len(rows) == 12


def test_each_environment_has_a_verdict(tmp_path):
    shares(tmp_path, Letters(), Letters(same=True), weights=[.7, .3], steps=12)
    assert verdict(course_of(tmp_path, "letters-2", "score", 6, 2)).startswith("letters-2: not learned: ")


class Long(Letters):
    "One prompt in two is longer than any conversation may be."
    def problem(self, key):
        return Task(env=self.name, prompt=f"Say {key % 1000}: "*(1 + 80*((key >> 20) % 2)), answer="x")

def test_a_prompt_that_is_too_long_costs_its_own_group(tmp_path):
    loop = make_loop(tmp_path, Long())
    assert math.isfinite(loop.asking.limit[0])
    loop, _ = play(tmp_path, Long())
    assert loop.state.step == 4 and loop.state.counts["dropped_too_long"] > 0
