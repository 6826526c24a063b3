"""A short training run on a given layout, for tests/test_sharding.py to start: its parameters go
to a file. `python sharded_run.py FOLDER LAYOUT [PROCESS PORT]`
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import sde_score as ss

STEPS = 50


def main(folder, layout, process=None, port=None, steps=STEPS):
    if process is not None:
        address = f"localhost:{port}"
        heartbeat = {"heartbeat_timeout_seconds": 10}
        jax.distributed.initialize(address, 2, int(process), **heartbeat)
    sde, net = ss.VP(), ss.nets.MLP(width=16, depth=1)
    x0 = ss.data.two_moons(jax.random.key(0), 1_000)
    params = net.init(jax.random.key(1), x0[0], 1.0)
    batches = ss.data.batches(jax.random.key(2), jax.device_get(x0), 64)
    mesh = ss.make_mesh(1 if layout == "one" else None)
    place = ss.shard_params if layout == "params" else ss.replicate
    params, batches = place(jax.device_get(params), mesh), ss.shard_batches(batches, mesh)

    def loss(params, key, batch):
        return ss.dsm_loss(key, ss.score_from_noise(sde, Partial(net.apply, params)), sde, batch)

    options = {"num_steps": int(steps), "save_every": 10, "log_every": 10, "report": None}
    fit_key = jax.random.key(3)
    state = ss.train(fit_key, loss, params, optax.adam(1e-3), batches, folder=folder, **options)
    whole = ss.replicate(state.params, mesh)  # gathered
    flat = np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(whole)])
    if jax.process_index() == 0:
        shards = {str(x.sharding.spec) for x in jax.tree.leaves(state.opt_state) if x.ndim}
        np.savez(Path(folder) / "result.npz", params=flat, shards=sorted(shards))
    assert jnp.isfinite(flat).all()


if __name__ == "__main__":
    main(*sys.argv[1:])
