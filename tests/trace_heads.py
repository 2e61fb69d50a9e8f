"""Trace heads trained on a mixture, for the tests of the trace and of likelihoods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from oracles import GaussianMixture

from jaxdiff import exact, score, train
from jaxdiff.fisher.heads import TraceHead
from jaxdiff.process import VP

PATH, D = VP(), 16


@functools.cache
def thin_and_wide():
    """The oracle and the exact denoiser of three components with thin and wide directions."""
    rng = np.random.default_rng(0)
    variances = np.where(np.arange(D) % 2, 0.003, 0.6)[None] * rng.uniform(0.5, 1.5, (3, D))
    mixture = GaussianMixture.diagonal([0.5, 0.3, 0.2], rng.normal(size=(3, D)), variances)
    return mixture, exact.mixture(PATH, mixture.weights, mixture.means, variances)


@functools.cache
def train_head(kind, steps=1000, batch=256, seed=0):
    """Train one head on `thin_and_wide`; return it and the exact denoiser that it goes with.

    The same network, data and budget for every kind, in float32.
    """
    mixture, denoiser = thin_and_wide()
    module = train.TraceNet(width=64, depth=2)
    roots = jnp.sqrt(jnp.diagonal(jnp.asarray(mixture.covs), axis1=1, axis2=2))
    means, logits = jnp.asarray(mixture.means), jnp.log(mixture.weights)
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def head(params):
        return TraceHead(score.from_linen(module, {"params": params}), kind)

    def loss(params, key):
        keys = jax.random.split(key, 3)
        which = jax.random.categorical(keys[0], logits, shape=(batch,))
        x0 = means[which] + roots[which] * jax.random.normal(keys[1], (batch, D))
        x0 = x0.astype(jnp.float32)
        return train.batch_trace_loss(keys[2], head(params), denoiser, x0)[0]

    def step(carry, key):
        params, state = carry
        updates, state = optimiser.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(key):
        first = jnp.zeros(1, jnp.float32), jnp.zeros((1, D), jnp.float32)
        params = module.init(key, *first)["params"]
        carry = params, optimiser.init(params)
        return jax.lax.scan(step, carry, jax.random.split(key, steps))[0][0]

    return head(run(jax.random.key(seed))), denoiser


def states(lam, n, seed=1):
    """A time of the given log-SNR and n samples of the path there."""
    mixture, _ = thin_and_wide()
    t = PATH.t_of_lam(lam)
    noise = np.random.default_rng(seed).normal(size=(n, D))
    return t, jnp.asarray(PATH.alpha(t) * mixture.sample(seed, n) + PATH.sigma(t) * noise)
