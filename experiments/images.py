"""Image models by the published recipes, in runs that survive: the same command resumes.

Digits and photographs' patches come with scikit-learn; MNIST, CIFAR-10 and CelebA from --data-dir,
where `python -m sde_score.data.prepare` has put them. Writes metrics.jsonl, speed.jsonl,
checkpoints, film.png (samples of fixed keys as training goes on), metrics.json and
score.safetensors. `--dry-run` says what a run would cost.
"""

import dataclasses
import os
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.figure import Figure
from sklearn.neural_network import MLPClassifier

import sde_score as ss
from experiments._run import Metrics, as_dict, check_numbers, cli, estimate, write_json
from experiments.digits import AtLevel
from sde_score import plots
from sde_score.data import augment, stream, tfds

CELEBA = {"crop": 140, "size": 64}
NAMES = {"celeba": "celeb_a"}


# The published ones are those of score SDE on CIFAR-10, of 1.3 million steps; "small" is ours.
PUBLISHED = {"batch_size": 128, "warm_up": 5_000, "ema_decay": 0.9999}
RECIPES = {
    "small": {"batch_size": 64, "warm_up": 500, "ema_decay": 0.999},
    **{"ddpm": PUBLISHED, "ddpmpp": PUBLISHED, "ncsnpp": PUBLISHED | {"ema_decay": 0.999}},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    data: Literal["digits", "patches", "mnist", "cifar10", "celeba"] = "digits"
    data_dir: Path | None = None
    recipe: Literal["small", "ddpm", "ddpmpp", "ncsnpp"] = "small"
    width: int | None = None  # of the network, by default the recipe's
    dropout: float = 0.1
    flip: bool = True  # left to right; not digits
    num_steps: int = 1_000
    batch_size: int | None = None  # this, warm_up and ema_decay by default the recipe's
    num_parts: int = 1  # of a batch, one at a time in memory
    distributed: bool = False  # over several processes, as SLURM or a pod starts them
    shard_params: bool = False  # over all devices, instead of a copy on each
    learning_rate: float = 2e-4
    warm_up: int | None = None
    clip: float = 1.0
    ema_decay: float | None = None
    save_every: int = 200
    evaluate_every: int = 200
    log_every: int = 20
    num_eval: int = 64  # held-out images and samples
    num_flow: int = 16  # of them, whose bits/dim are found by the flow in the end; 1 for none
    stream: bool = False  # read from the disk as training goes on, instead of before
    bfloat16: bool = False
    resume: Literal["auto", "must", "never"] = "auto"
    dry_run: bool = False
    seed: int = 0
    out: Path = Path("runs/images")

    def __post_init__(self) -> None:
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_numbers(self, may_be_zero=("seed", "dropout", "warm_up"))
        if self.data_dir is None and self.data not in ("digits", "patches"):
            raise ValueError(f"`data_dir` must be given for {self.data}. Add --data-dir DIR.")
        if ".." in self.out.parts:
            raise ValueError(f"`out` must not climb with '..'; got {self.out}.")


QUICK = Config(
    num_steps=40, num_eval=8, num_flow=1, warm_up=10, save_every=20, evaluate_every=40, width=8
)
LEVELS = {"digits": 17}


def main(config: Config) -> Metrics:
    """Train or go on, evaluate; returns the metrics that it writes."""
    if config.distributed:
        jax.distributed.initialize()
        multihost_utils.sync_global_devices("start")  # to find each other before they compile
    mesh = ss.make_mesh()
    train, test, feed = _data(config, mesh)
    shape = (*[side + -side % 8 for side in test.images.shape[1:3]], test.images.shape[3])
    model = Model(config, shape)
    init_key, batch_key, fit_key, eval_key = jax.random.split(jax.random.key(config.seed), 4)
    variables = jax.jit(model.net.init)(init_key, jnp.zeros(shape), 1.0)
    params, constants = variables["params"], variables.get("constants", {})
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, max(config.warm_up, 1)),
            optax.constant_schedule(config.learning_rate),
        ],
        [config.warm_up],
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(schedule))
    params = (ss.shard_params if config.shard_params else ss.replicate)(params, mesh)
    batches = ss.shard_batches(ss.data.batches(batch_key, train, config.batch_size), mesh)
    loss = partial(model.loss, constants)
    if config.dry_run:
        return dry_run(fit_key, config, loss, params, optimizer, batches)
    evaluate = Evaluation(config, model, constants, eval_key, train, test)
    left_out = {"out", "num_steps", "resume", "dry_run", "data_dir", "save_every"}
    left_out |= {"distributed", "shard_params"}
    state = ss.train(
        fit_key,
        loss,
        params,
        optimizer,
        batches,
        feed=feed,
        num_steps=config.num_steps,
        folder=config.out,
        config={k: v for k, v in as_dict(config).items() if k not in left_out},
        resume={"auto": None, "must": True, "never": False}[config.resume],
        save_every=config.save_every,
        log_every=config.log_every,
        scan=jax.default_backend() != "cpu",  # convolution gradients in loops are slow there
        ema_decay=config.ema_decay,
        num_parts=config.num_parts,
        best="bound_bits_per_dim",
        evaluate=evaluate,
        evaluate_every=config.evaluate_every,
    )
    step, metrics = evaluate.last
    if step != int(state.step):  # a run that had ended before
        metrics = evaluate(state)
    if config.num_flow > 1:
        metrics |= evaluate.flow_bits(state)
    params = _whole(state.ema_params)
    if jax.process_index() == 0:
        ss.save_params(config.out / "score.safetensors", params, as_dict(config))
        write_json(config.out / "config.json", as_dict(config))
        write_json(config.out / "metrics.json", metrics)
    return metrics


class Model:
    """A recipe: the SDE, the network, and a score in the data's range."""

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        fields: dict[str, Any] = {"dropout": config.dropout, "channels": shape[-1]}
        fields |= {} if config.width is None else {"width": config.width}
        fields |= {"dtype": jnp.bfloat16} if config.bfloat16 else {}
        self.recipe, self.shape, self.levels = config.recipe, shape, LEVELS.get(config.data, 256)
        self.flip = config.flip and config.data not in ("digits", "mnist")
        self.sde, self.range = ss.VP(), (-1.0, 1.0)
        if config.recipe == "small":
            small = {"multipliers": (1, 2), "num_blocks": 1, "attention_levels": (), "width": 32}
            self.net = AtLevel(ss.nets.UNet(**{**small, **fields}))
        elif config.recipe == "ncsnpp":
            self.sde, self.range = (
                ss.VE(sigma_max=90.0 if config.data == "celeba" else 50.0),
                (0.0, 1.0),
            )
            if config.data == "celeba":  # attention at 16 × 16
                fields = {"attention_levels": (2,)} | fields
            self.net = ss.nets.presets.ncsnpp(**fields)
        else:
            self.net = getattr(ss.nets.presets, config.recipe)(**fields)

    def to_model(self, key: ss.Key, images: Array) -> Array:
        """Padded to multiples of 8 by zeros, and dequantised."""
        pad = [(0, want - have) for want, have in zip(self.shape, images.shape[1:], strict=True)]
        images = jnp.pad(images, [(0, 0), *pad])
        return ss.uniform_dequantize(key, images, num_levels=self.levels, data_range=self.range)

    def score(self, constants: Any, params: ss.Params) -> Partial:
        net_fn = Partial(partial(_apply, self.net), {"params": params, "constants": constants})
        if self.recipe == "small":
            return ss.score_from_preconditioned(self.sde, net_fn, sigma_data=0.5)
        if self.recipe == "ncsnpp":  # which divides by sigma itself
            return Partial(_at_sigma, net_fn, self.sde)
        return ss.score_from_noise(self.sde, Partial(_at_label, net_fn))

    def loss(self, constants: Any, params: ss.Params, key: ss.Key, batch: Any) -> Array:
        flip_key, data_key, dropout_key, loss_key = jax.random.split(key, 4)
        images, num = batch.images, len(batch.images)
        if self.flip:
            images = jax.vmap(augment.random_flip)(jax.random.split(flip_key, num), images)
        options = {"context": jax.random.split(dropout_key, num)}
        if self.recipe == "small":
            options |= {"weight": ss.likelihood_weight, "times": ss.likelihood_times}
        x0 = self.to_model(data_key, images)
        return ss.dsm_loss(loss_key, self.score(constants, params), self.sde, x0, **options)


def _apply(net: Any, variables: Any, x: Array, time: Array, *context: Any) -> Array:
    return net.apply(variables, x, time, *context)


def _at_sigma(net_fn: Partial, sde: ss.VE, x: Array, t: Array, *context: Any) -> Array:
    return net_fn(x, sde.sigma(t), *context)


def _at_label(net_fn: Partial, x: Array, t: Array, *context: Any) -> Array:
    return net_fn(x, 999.0 * t, *context)


class Evaluation:
    """Of the averaged parameters, by the same keys each time: samples for the film, distances from
    held-out images, bits/dim, and the loss by noise level.
    """

    def __init__(
        self, config: Config, model: Model, constants: Any, key: ss.Key, train: Any, test: Any
    ) -> None:
        self.config, self.model, self.constants, self.key = config, model, constants, key
        self.images = test.images[: config.num_eval]
        self.last: tuple[int, Metrics] = -1, {}
        bound = partial(ss.log_likelihood_bound, num_draws=16)  # of far less cost than the flow's
        self._bounds = jax.jit(jax.vmap(bound, (0, None, None, 0)))  # compiled once
        self._losses = jax.jit(partial(_level_losses, model))
        self.features = _features(train.images[:2_000], train.labels[:2_000])

    def __call__(self, state: ss.TrainState) -> Metrics:
        config, model, sde = self.config, self.model, self.model.sde
        score_fn = model.score(self.constants, _whole(state.ema_params))
        data_key, loss_key, bits_key, sample_key = jax.random.split(self.key, 4)
        x0 = model.to_model(data_key, self.images)
        keys = jax.random.split(sample_key, config.num_eval)
        samples = ss.map_in_chunks(_draw, keys, score_fn, sde, x0[0], chunk_size=64)
        low, high = model.range
        kept = np.clip(samples, low, high)[:, : self.images.shape[1], : self.images.shape[2]]
        levels = np.floor((kept - low) / (high - low) * model.levels)
        levels = np.clip(levels, 0, model.levels - 1)
        if jax.process_index() == 0:
            frames = config.out / "film"
            frames.mkdir(parents=True, exist_ok=True)
            with (frames / "partial").open("wb") as file:
                np.save(file, levels[:8].astype(np.uint8))
            os.replace(frames / "partial", frames / f"{int(state.step):08d}.npy")
            _film(frames, model.levels).savefig(config.out / "film.png", dpi=120)
        metrics: Metrics = {}
        distance = ss.metrics.energy_distance(samples, x0)
        metrics["energy_distance"], metrics["energy_distance_stderr"] = map(float, distance)
        frechet = ss.metrics.frechet_distance(*map(self.features, (levels, self.images)))
        metrics["feature_distance"], metrics["feature_distance_stderr"] = map(float, frechet)
        losses = self._losses(loss_key, score_fn, x0)
        metrics |= {f"loss_level_{i}": float(value) for i, value in enumerate(losses)}
        bounds = self._bounds(jax.random.split(bits_key, len(x0)), score_fn, sde, x0)
        metrics |= estimate("bound_bits_per_dim", self.bits(bounds.log_prob))
        self.last = int(state.step), metrics
        return metrics

    def bits(self, log_prob: Array) -> Array:
        """For each number of an image, without those that pad it: known, they have no bits."""
        dims = int(np.prod(self.model.shape))
        known = {"num_levels": self.model.levels, "data_range": self.model.range}
        bits = ss.bits_per_dim(jnp.asarray(log_prob), dims, **known)
        return bits * (dims / self.images[0].size)

    def flow_bits(self, state: ss.TrainState) -> Metrics:
        """By the probability flow, of the first `num_flow` images."""
        score_fn = self.model.score(self.constants, _whole(state.ema_params))
        x0 = self.model.to_model(self.key, self.images[: self.config.num_flow])
        options = {"rtol": 1e-3, "atol": 1e-3, "chunk_size": 16}
        out = ss.dataset_log_likelihood(self.key, score_fn, self.model.sde, x0, **options)
        return estimate("bits_per_dim", self.bits(out.log_probs))


def _whole(params: Any) -> Any:
    """The parameters on this process's device, wherever they lie: each evaluates for itself."""
    return jax.device_get(ss.replicate(params, ss.make_mesh()))


def _draw(key: ss.Key, score_fn: Partial, sde: ss.SDE, like: Array) -> Array:
    ts = ss.log_snr_grid(sde, 20)
    return ss.sample_multistep(key, score_fn, sde, like.shape, method=ss.adams(), ts=ts)


def _level_losses(model: Model, key: ss.Key, score_fn: Partial, x0: Array) -> Array:
    """The denoising loss at five times, equal in log-SNR from the noise down, per dimension."""
    ts = ss.log_snr_grid(model.sde, 6)[1:-1]
    one = lambda key, x, t: ss.denoising_score_matching(key, score_fn, model.sde, x, t)  # noqa: E731
    at = lambda key, t: jax.vmap(one, (0, 0, None))(jax.random.split(key, len(x0)), x0, t)  # noqa: E731
    losses = jnp.stack(
        [at(k, t).mean() for k, t in zip(jax.random.split(key, 5), ts, strict=True)]
    )
    return losses / x0[0].size


def _features(images: Array, labels: Array) -> Any:
    """The hidden layer of scikit-learn's classifier of the training labels, of seed 0: features
    for a Fréchet distance of our own, which is not the FID.
    """
    scale = float(images.max())
    flat = lambda x: np.asarray(x, np.float32).reshape(len(x), -1) / scale  # noqa: E731
    labels = np.asarray(labels) if len(np.unique(labels)) > 1 else np.arange(len(labels)) % 2
    model = MLPClassifier((16,), max_iter=20, random_state=0)
    with warnings.catch_warnings(action="ignore"):  # 20 epochs are enough for features
        model.fit(flat(images), labels)
    return lambda x: np.maximum(flat(x) @ model.coefs_[0] + model.intercepts_[0], 0.0)


def _film(frames: Path, levels: int) -> Figure:
    """A row of samples for each evaluation, the same keys in each column."""
    paths = sorted(frames.glob("*.npy"))[-12:]
    figure = Figure(figsize=(6, 0.8 * len(paths) + 0.4), layout="constrained")
    images = np.concatenate([np.load(path) for path in paths])
    ax = figure.subplots()
    plots.image_grid(images, columns=8, value_range=(0, levels - 1), ax=ax)
    ax.set_title("steps " + ", ".join(str(int(path.stem)) for path in paths))
    return figure


def dry_run(
    key: ss.Key, config: Config, loss: Any, params: Any, optimizer: Any, batches: Any
) -> Metrics:
    """What a run would cost, from one compiled step run three times."""
    state = ss.init_train_state(params, optimizer)
    step = jax.jit(ss.make_train_step(loss, optimizer, num_parts=config.num_parts))
    batch = jax.jit(batches)(0)
    compiled = step.lower(state, key, batch).compile()
    jax.block_until_ready(compiled(state, key, batch))
    start = time.perf_counter()
    for _ in range(3):
        jax.block_until_ready(compiled(state, key, batch))
    seconds = (time.perf_counter() - start) / 3
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "state_mib": state_bytes / 2**20,
        "step_mib": memory.temp_size_in_bytes / 2**20,
        "gflops_per_step": cost.get("flops", np.nan) / 1e9,
        "seconds_per_step": seconds,
        "hours": seconds * config.num_steps / 3600,
    }


def _data(config: Config, mesh: Any) -> tuple[Any, Any, Any]:
    """Training and held-out examples, and the stream that replaces the first."""
    if config.data in ("digits", "patches"):
        return *getattr(ss.data, config.data)(), None
    options = CELEBA if config.data == "celeba" else {}
    options = {"data_dir": config.data_dir, **options}
    name = NAMES.get(config.data, config.data)
    test = tfds.load(name, split="test", **options)
    if not config.stream:
        return tfds.load(name, split="train", **options), test, None
    source = tfds.open_source(name, split="train", **options)
    feed = stream.stream(source, config.seed, config.batch_size, mesh=mesh)
    return test, test, feed


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
