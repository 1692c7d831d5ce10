"""Several processes of one bench file, one a rank, as torchrun starts them; one that fails ends the others."""
import json, os, socket, subprocess, sys, tempfile, time
from pathlib import Path


def start_ranks(file: str, world: int, part: str, given: dict, limit: float = 400.):
    """What rank 0 of `python FILE PART GIVEN OUT` left in OUT.

    Raises `RuntimeError` with the exit codes when one fails or none ends."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as tmp:
        out, end = Path(tmp)/"out.json", time.time() + limit
        def one(rank):
            env = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port), NVSHMEM_REMOTE_TRANSPORT="none")
            env.setdefault("OMP_NUM_THREADS", "1")
            return subprocess.Popen([sys.executable, file, part, json.dumps(given), str(out)], env=env)
        procs = [one(r) for r in range(world)]
        try:
            while any(p.poll() is None for p in procs) and time.time() < end and not any(p.poll() for p in procs):
                time.sleep(.2)
        finally:
            codes = [p.poll() for p in procs]
            for p in procs: p.kill()
        if codes != [0]*world: raise RuntimeError(f"{part}: exit codes {codes} (None: no end within {limit:.0f} s)")
        return json.loads(out.read_text())


def join_ranks(device: str):
    "Join the group that `start_ranks` described; the device of this rank."
    from datetime import timedelta
    import torch
    import torch.distributed as dist
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])),
            timeout=timedelta(seconds=120))
    else: dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    return torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
