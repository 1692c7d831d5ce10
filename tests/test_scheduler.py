"""The scheduler against an oracle that knows what every slot of the cache contains."""
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test)

from moe_rl.rollout import kvcache, scheduler
from moe_rl.rollout.scheduler import Scheduler

LANES = {"train": .75, "eval": .25}


class Play(RuleBasedStateMachine):
    """Random requests, aborts and new versions.

    A slot contains (version, all tokens up to its own): what real KV is a function of."""

    @initialize(blocks=st.integers(2, 14), size=st.integers(1, 5), seats=st.integers(1, 6), extra=st.integers(1, 20),
        cache=st.sampled_from([True, True, True, False]))
    def start(self, blocks, size, seats, extra, cache):
        self.s = Scheduler(blocks, size, seats, seats+extra, LANES, prefix_cache=cache)
        self.slots = np.full((blocks*size, 2), -1)
        self.ended, self.asked, self.texts = [], {}, {}

    def _try_add(self, prompt, max_tokens, lane):
        id = f"r{len(self.asked)}"
        fits = len(prompt)+max_tokens-1 <= self.s.pool.num_blocks*self.s.block_size
        if not fits:
            with pytest.raises(ValueError, match="budget"): self.s.add(id, prompt, max_tokens, lane)
            return
        self.s.add(id, prompt, max_tokens, lane)
        self.asked[id] = (prompt, max_tokens)

    @rule(text=st.sampled_from([0b1011, 0b1010, 0b0011]), n=st.integers(1, 24), max_tokens=st.integers(1, 20),
        lane=st.sampled_from(sorted(LANES)), copies=st.integers(1, 4))
    def add(self, text, n, max_tokens, lane, copies):
        for _ in range(copies): self._try_add([text >> i%4 & 1 for i in range(n)], max_tokens, lane)

    @precondition(lambda self: self.s.seqs)
    @rule(n=st.integers(1, 6))
    def run(self, n):
        for _ in range(n): self.step()

    def step(self):
        s = self.s
        if not s.seqs: return
        oldest = min((q.arrival for q in s.at if q), default=None)
        plan = s.schedule()
        assert len(plan.rows), "requests are there and nothing is planned"
        assert plan.counts.sum() <= s.max_step_tokens and (plan.counts >= 1).all()
        assert (kvcache.step_order(plan.starts+plan.counts, plan.counts) == np.arange(len(plan.rows))).all()
        for seq,*_ in plan.evicted: assert seq.arrival != oldest, "the oldest running request was sent away"
        size, at = s.block_size, lambda block, n: np.arange(block*size, block*size+n)
        if plan.copies:
            self.slots[np.concatenate([at(t, n) for _,t,n in plan.copies])] = self.slots[np.concatenate([at(b, n)
                for b,_,n in plan.copies])]
        spans = list(zip(plan.rows.tolist(), plan.starts.tolist(), plan.counts.tolist()))
        written = np.concatenate([self._at(row, a, a+n) for row,a,n in spans])
        assert len(set(written.tolist())) == len(written), "two requests write to one slot"
        for row,a,n in spans:
            self.slots[self._at(row, a, a+n)] = np.stack([np.full(n, s.version), self._text(row)[a:a+n]], 1)
        for row,a,n in spans: self._check_row(row, a+n)
        s.commit(plan)
        rows = plan.rows[plan.samples]
        s.extend(rows, s.length[rows] % 2) # a function of the position: equal prompts go on equally
        for row in rows[s.length[rows] == [s.at[r].max_length for r in rows]].tolist(): self._end(s.at[row].id)

    def _at(self, row, a, b):
        p = np.arange(a, b)
        return self.s.tables[row,p//self.s.block_size]*self.s.block_size + p%self.s.block_size

    def _text(self, row):
        "For each position a number that stands for the whole text up to it."
        s, known = self.s, self.texts.setdefault(self.s.at[row].id, [1])
        for token in s.tokens[row,len(known)-1:s.length[row]].tolist():
            known.append((known[-1]*1_000_003 + token + 7) % (2**61-1))
        return np.array(known[1:])

    def _check_row(self, row, upto):
        seq = self.s.at[row]
        version, text = self.slots[self._at(row, 0, upto)].T
        assert (text == self._text(row)[:upto]).all(), f"{seq.id} looks at the KV of another text"
        assert (version == self.s.version).all() or (not seq.pure
            and (version >= 0).all()), f"{seq.id} uses KV of another version"

    def _end(self, id):
        prompt, max_tokens = self.asked[id]
        tokens = self.s.remove(id).tokens
        assert tokens[:len(prompt)].tolist() == prompt, "a request came back with another prompt"
        assert tokens[len(prompt):].tolist() == [p%2 for p in range(len(prompt),
            len(tokens))], "a generated token was lost"
        self.ended.append(id)

    @precondition(lambda self: self.s.seqs)
    @rule(data=st.data())
    def abort(self, data):
        self._end(data.draw(st.sampled_from(sorted(self.s.seqs))))

    @precondition(lambda self: self.s.running)
    @rule(recompute=st.booleans())
    def new_version(self, recompute): self.s.new_version(self.s.version+1, recompute)

    @invariant()
    def books_balance(self):
        if not hasattr(self, "s"): return
        s, pool = self.s, self.s.pool
        holders = np.zeros(pool.num_blocks, int)
        for row in np.flatnonzero(s.active):
            np.add.at(holders, s.tables[row,:s.blocks[row]], 1)
            assert s.computed[row] <= s.length[row] <= s.blocks[row]*s.block_size + 1
        assert pool.held <= pool.num_blocks
        assert holders.tolist() == pool.refs, "a block is held by nobody, or by somebody unknown"
        assert {b for b,r in enumerate(pool.refs) if not r} == set(pool.free)
        assert {(k,b) for k,b in pool.found.items()} == {(k,b) for b,names in enumerate(pool.names) for k in names}
        assert {q.id for q in s.at if q} | {q.id for l in s.lanes.values() for q in l.queue} == set(s.seqs)
        assert all(q.row >= 0 and q.leads for q in s.leaders.values())
        assert sorted(set(self.asked)-set(self.ended)) == sorted(s.seqs) and len(set(self.ended)) == len(self.ended)

    def teardown(self):
        if not hasattr(self, "s"): return
        for _ in range(4*sum(len(p)+n for p,n in self.asked.values())):
            if not self.s.seqs: break
            self.step()
        assert sorted(self.ended) == sorted(self.asked), "somebody never finished"
        assert self.s.pool.held == 0 and self.s.running == self.s.waiting == 0
        self.books_balance()


def play(examples, phases=tuple(Phase)):
    quiet = settings(max_examples=examples, stateful_step_count=25, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), phases=phases, print_blob=False)
    run_state_machine_as_test(Play, settings=quiet)


def test_memory_is_never_over_budget_and_everybody_finishes_once(): play(150)


def bug_names_without_version(monkeypatch):
    monkeypatch.setattr(kvcache, "root_key", lambda version: b"")
    monkeypatch.setattr(scheduler, "root_key", lambda version: b"")
    monkeypatch.setattr(kvcache.BlockPool, "forget_all", lambda self: None)

def bug_mixtures_get_names(monkeypatch):
    monkeypatch.setattr(scheduler.Sequence, "pure", property(lambda self: True, lambda self, v: None), raising=False)

def bug_names_without_history(monkeypatch):
    monkeypatch.setattr(kvcache, "block_key", lambda parent, tokens: tokens.tobytes())
    monkeypatch.setattr(scheduler, "block_key", lambda parent, tokens: tokens.tobytes())

def bug_copy_forgotten(monkeypatch):
    real = scheduler.place
    def place(s, seq, plan):
        ok = real(s, seq, plan)
        plan.copies.clear()
        return ok
    monkeypatch.setattr(scheduler, "place", place)

def bug_block_kept_after_the_end(monkeypatch):
    monkeypatch.setattr(kvcache.BlockPool, "release", lambda self, block: None)

def bug_oldest_is_preempted(monkeypatch):
    real = scheduler.evict
    def evict(s, seq, plan):
        real(s, s.at[int(np.argmin(np.where(s.active, s.age, 2**60)))] if plan is not None else seq, plan)
    monkeypatch.setattr(scheduler, "evict", evict)

def bug_preempted_request_keeps_its_tokens_in_the_seat(monkeypatch):
    real = scheduler.Seats.vacate
    def vacate(self, seq):
        row = seq.row
        n, table = self.length[row], real(self, seq)
        seq.tokens = self.tokens[row,:n]
        return table
    monkeypatch.setattr(scheduler.Seats, "vacate", vacate)

def bug_rest_taken_over_while_it_is_held(monkeypatch):
    class Nobody(list):
        def __getitem__(self, i): return 0
    real = scheduler.place
    def place(s, seq, plan):
        refs, s.pool.refs = s.pool.refs, Nobody(s.pool.refs)
        try: shared, rest = scheduler.find_prefix(s, seq) if seq.keys is not None else ([], None)
        finally: s.pool.refs = refs
        if rest is None: return real(s, seq, plan)
        for b in [*shared, rest]: s.pool.share(b)
        s.seat(seq, [*shared, rest], len(shared), len(seq.tokens)-1)
        plan.admitted.append((seq, seq.row))
        return True
    monkeypatch.setattr(scheduler, "place", place)

BUGS = [bug_names_without_version, bug_mixtures_get_names, bug_names_without_history, bug_copy_forgotten,
        bug_block_kept_after_the_end, bug_oldest_is_preempted,
        bug_preempted_request_keeps_its_tokens_in_the_seat, bug_rest_taken_over_while_it_is_held]

@pytest.mark.parametrize("bug", BUGS)
def test_the_oracle_catches(bug, monkeypatch):
    bug(monkeypatch)
    with pytest.raises((AssertionError, ValueError, KeyError, IndexError)): play(150, phases=[Phase.generate])


def steps(s):
    "Run everything that is queued: the plan of each step, and the ids that ended with it."
    for _ in range(100_000):
        if not s.seqs: return
        plan = s.schedule()
        s.commit(plan)
        rows = plan.rows[plan.samples]
        s.extend(rows, np.zeros(len(rows), np.int32))
        yield plan, [s.remove(s.at[r].id).id for r in rows.tolist() if s.length[r] == s.at[r].max_length]
    raise AssertionError("not drained")

def drain(s): return [id for _, ended in steps(s) for id in ended]

def test_a_large_request_is_not_overtaken_for_ever_by_small_ones():
    s = Scheduler(8, 4, 8)
    for i in range(4): s.add(f"a{i}", [i]*4, 8)
    s.add("large", list(range(20)), 12)
    for i in range(60): s.add(f"b{i}", [i]*4, 8)
    assert drain(s).index("large") < 12

def lanes_apart(share_of_load):
    "Position of the last eval request among 120, when 100 training requests were there first."
    s = Scheduler(64, 8, 8, lanes=LANES)
    for i in range(100): s.add(f"t{i}", [i, i+1], 6)
    for i in range(20): s.add(f"e{i}", [200+i], 6, lane="eval")
    order = drain(s)
    return max(i for i,id in enumerate(order) if id[0] == "e")

def test_known_failure_32_evaluation_and_training_do_not_starve_each_other(monkeypatch):
    assert lanes_apart(True) < 90
    s = Scheduler(64, 8, 8, lanes=LANES)
    for i in range(100): s.add(f"e{i}", [i], 6, lane="eval")
    for i in range(20): s.add(f"t{i}", [200+i], 6)
    order = drain(s)
    assert max(i for i,id in enumerate(order) if id[0] == "t") < 60
    # the bug: one queue for both, in order of arrival
    class OneQueue(scheduler.Lane):
        @property
        def running(self): return 0
        @running.setter
        def running(self, n): pass
    monkeypatch.setattr(scheduler, "Lane", OneQueue)
    assert lanes_apart(False) >= 100


def plans(s, requests):
    "Seats, positions and counts of every step until `requests` are through."
    for id, prompt, n, lane in requests: s.add(id, prompt, n, lane)
    return [[x.tolist() for x in (plan.rows, plan.starts, plan.counts)] for plan, _ in steps(s)]

work = st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.integers(1, 9),
    st.sampled_from(sorted(LANES))), min_size=1, max_size=12)

def history_leaves_no_trace(examples, phases=tuple(Phase)):
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases)
    @given(before=work, after=work)
    def check(before, after):
        old, new = (Scheduler(12, 4, 5, lanes=LANES) for _ in range(2))
        plans(old, [(f"a{i}", *r) for i, r in enumerate(before)])
        for s in (old, new): s.new_version(1, False)
        after = [(f"b{i}", *r) for i, r in enumerate(after)]
        assert plans(old, after) == plans(new, after)
    check()

def test_an_engine_that_was_replaced_batches_like_the_one_before(monkeypatch):
    "A resumed run has a fresh engine; another order of the rows in a batch is another rounding."
    history_leaves_no_trace(60)
    # the bug: the seat that was left last is taken first
    monkeypatch.setattr(scheduler, "heappush", lambda seats, row: seats.insert(0, row))
    monkeypatch.setattr(scheduler, "heappop", lambda seats: seats.pop(0))
    with pytest.raises(AssertionError): history_leaves_no_trace(60, [Phase.generate])
