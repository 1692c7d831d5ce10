"""Asynchronous mode under SIGKILL: whichever process dies, whenever, the run goes on and the ledger of the final weights is whole."""
import argparse, random, signal, subprocess, time
from pathlib import Path
import psutil
from _runs import Run, folders
from moe_rl.bench import repository
from moe_rl.config import load_settings, to_toml
from moe_rl.records import decode
from moe_rl.rl.buffer import BufferState
from moe_rl.rl.log import audit
from moe_rl.rl.orchestrator import State
from moe_rl.train.checkpoint import latest, load_state


def workers(run, role: str) -> list[psutil.Process]:
    "Live worker processes of a run."
    try: children = psutil.Process(run.process.pid).children(recursive=True)
    except psutil.NoSuchProcess: return []
    out = []
    for p in children:
        try:
            if 'moe_rl.rl.workers' in p.cmdline() and role in p.cmdline(): out.append(p)
        except psutil.NoSuchProcess: pass
    return out


def books(folder: Path) -> dict:
    "Audit of the last commit: every rollout ever issued is trained, dropped with a reason, waiting, or being played; once."
    state = load_state(latest(folder) / 'orchestrator.msgpack', State)
    buffer = decode(BufferState, state.buffer)
    from moe_rl.rl.log import read_lines
    issued = {f'{g}-{i}' for g in range(state.next_group) for i in range(buffer.group_size)}
    waiting = {f'{g}-{i}' for g, indices in state.live.items() for i in indices}
    waiting |= {r.id for rs in buffer.members.values() for r in rs} | {r.id for g in buffer.complete for r in g.rollouts}
    ledger = read_lines(folder / 'ledger.jsonl')
    steps = [line['step'] for line in ledger]
    found = audit(ledger, issued, waiting)
    trained = sum(len(line['trained']) for line in ledger)
    print(f'{state.step} steps, {len(issued)} rollouts issued, {trained} trained, {len(waiting)} waiting; ledger of steps {steps[0]} to {steps[-1]}')
    if steps != list(range(1, state.step + 1)): found['lost'].append('steps')
    return found


def measure(args):
    p = argparse.ArgumentParser(prog='moe-rl bench chaos')
    p.add_argument('--kills', type=int, default=30)
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args(args)
    root, rng = repository(), random.Random(a.seed)
    folder = folders(root, 'chaos') / 'run'
    run = Run(folder, '--config', str(root / 'configs' / 'main_job.toml'), '--dir', str(folder), '--warm_start.steps', '20', '--rl.reward', 'score', '--rl.zero_variance', 'keep', '--rl.seconds', '0', '--rl.stop_at', '0', '--rl.steps', '100000',
              '--checkpoint.every', '3', '--eval.every', '20', '--eval.prompts', '64', '--schedule.engine_restarts', '1000').start()
    hangs = kills = 0
    while kills < a.kills:
        victim = rng.choice(('orchestrator', 'trainer', 'engine'))
        start, limit = latest(folder), time.monotonic() + 40
        while rng.random() < 0.9 and latest(folder) == start and time.monotonic() < limit and run.process.poll() is None: time.sleep(0.5) # mostly after a new commit, sometimes before
        time.sleep(rng.uniform(0, 2))
        if run.process.poll() is not None: raise RuntimeError(f'run ended by itself with code {run.process.poll()}: ' + folder.with_suffix('.log').read_text()[-600:])
        targets = [psutil.Process(run.process.pid)] if victim == 'orchestrator' else workers(run, victim)
        if not targets: continue
        before = latest(folder)
        rng.choice(targets).send_signal(signal.SIGKILL)
        kills += 1
        print(f'{kills:2} {victim} killed at committed step {before.name[5:] if before else "none"}', flush=True)
        if victim == 'engine':                         # the run itself must go on: a new commit within a minute
            limit = time.monotonic() + 60
            while latest(folder) == before and time.monotonic() < limit and run.process.poll() is None: time.sleep(0.2)
            hangs += latest(folder) == before
            continue
        try: run.process.wait(60)
        except subprocess.TimeoutExpired: hangs += 1; run.kill()
        run.args = ('--resume', str(folder))
        run.start()
    run.kill()                                         # the last life: a few steps more, to the end
    time.sleep(1)
    if not latest(folder): raise RuntimeError('no step was ever committed')
    settings = load_settings(folder / 'config.toml')
    settings.rl.steps = int(latest(folder).name[5:]) + 5
    (folder / 'config.toml').write_text(to_toml(settings))
    run.args = ('--resume', str(folder))
    if code := run.start().wait(300): raise RuntimeError(f'last life ended with code {code}: ' + folder.with_suffix('.log').read_text()[-600:])
    found = books(folder)
    for key, ids in found.items():
        if ids: print(f'{key}: {ids[:10]}')
    return dict(figures=dict(kills=kills, lost=len(found['lost']), duplicated=len(found['duplicated']) + len(found['invented']), hangs=hangs, steps=settings.rl.steps))
