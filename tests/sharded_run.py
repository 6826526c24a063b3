"""A short training run on a given layout, for tests/test_sharding.py to start: its parameters go
to a file.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import sde_score as ss


def main(folder, layout, steps, feed, process, port):
    if process is not None:
        heartbeat = {"heartbeat_timeout_seconds": 10}
        jax.distributed.initialize(f"localhost:{port}", 2, process, **heartbeat)
    sde, net = ss.VP(), ss.nets.MLP(width=16, depth=1)
    x0 = jax.device_get(ss.data.two_moons(jax.random.key(0), 1_000))
    params = net.init(jax.random.key(1), x0[0], 1.0)
    mesh = ss.make_mesh(1 if layout == "one" else None)
    place = ss.shard_params if layout == "params" else ss.replicate
    params = place(jax.device_get(params), mesh)

    def loss(params, key, batch):
        return ss.dsm_loss(key, ss.score_from_noise(sde, Partial(net.apply, params)), sde, batch)

    options = {"num_steps": steps, "save_every": 10, "log_every": 10, "report": None}
    if feed == "stream":
        options |= {"batches": None, "feed": ss.data.stream(x0, 0, 64, mesh=mesh)}
    else:
        batches = ss.data.batches(jax.random.key(2), x0, 64)
        options |= {"batches": ss.shard_batches(batches, mesh)}
    fit_key = jax.random.key(3)
    state = ss.train(fit_key, loss, params, optax.adam(1e-3), folder=folder, **options)
    whole = ss.replicate(state.params, mesh)  # gathered
    flat = np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(whole)])
    if jax.process_index() == 0:
        shards = {str(x.sharding.spec) for x in jax.tree.leaves(state.opt_state) if x.ndim}
        np.savez(Path(folder) / "result.npz", params=flat, shards=sorted(shards))
    assert jnp.isfinite(flat).all()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("layout", choices=["one", "data", "params"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--feed", choices=["memory", "stream"], default="memory")
    parser.add_argument("--process", type=int)
    parser.add_argument("--port", type=int)
    main(**vars(parser.parse_args()))
