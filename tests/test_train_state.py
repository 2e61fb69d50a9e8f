import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.train import state as train

KEY = jax.random.key(0)


def quadratic(params, key, batch):
    error = params["w"] - batch
    return jnp.sum(error**2), {"largest": jnp.max(jnp.abs(error))}


def test_a_step_decreases_a_convex_loss():
    optimiser = optax.sgd(0.1)
    state = train.init(KEY, {"w": jnp.array([3.0, -1.0])}, optimiser)
    step, target = train.make_step(quadratic, optimiser), jnp.array([1.0, 1.0])
    seen = []
    for _ in range(5):
        state, metrics = step(state, target)
        seen.append(float(metrics["loss"]))
    assert seen[0] == 8.0 and np.all(np.diff(seen) < 0)
    np.testing.assert_allclose(metrics["grad_norm"], 2 * np.sqrt(seen[-1]), rtol=1e-6)
    assert metrics["aux"]["largest"] > 0
    assert state.step == 5 and state.step.dtype == jnp.int32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ema_is_float32_and_follows_its_recurrence(dtype):
    optimiser = optax.sgd(1e-3)
    params = {"w": jnp.full(4, 1.0, dtype), "count": jnp.arange(3)}
    state = train.init(KEY, params, optimiser)
    step = train.make_step(quadratic, optimiser, ema_decay=0.2)
    ema = np.ones(4, np.float32)
    rtol = 1e-6 if dtype == jnp.float32 else 2**-9  # compiled code may skip the rounding of params
    for n in range(6):
        state, _ = step(state, jnp.full(4, -3.0, dtype))
        decay = np.float32(min(0.2, (1 + n) / (10 + n)))
        ema += (1 - decay) * (np.asarray(state.params["w"], np.float32) - ema)
    assert state.params["w"].dtype == dtype and state.ema["w"].dtype == jnp.float32
    np.testing.assert_allclose(state.ema["w"], ema, rtol=rtol)
    assert state.ema["w"][0] != state.ema["w"][0].astype(jnp.bfloat16)
    assert state.params["count"].tolist() == state.ema["count"].tolist() == [0, 1, 2]


def test_steps_trace_once_use_fresh_keys_and_keep_the_old_state():
    traces = []

    def noise(params, key, batch):
        traces.append(1)
        return jnp.sum(params * 0) + jax.random.normal(key), None

    optimiser = optax.adam(1e-2)
    first = state = train.init(KEY, jnp.ones(2), optimiser)
    step = train.make_step(noise, optimiser)
    losses = []
    for n in range(3):
        state, metrics = step(state, None)
        losses.append(float(metrics["loss"]))
        assert losses[-1] == jax.random.normal(jax.random.fold_in(KEY, n))
    assert len(traces) == 1 and len(set(losses)) == 3
    again, metrics = step(first, None)  # the buffers of the first state are still alive
    assert metrics["loss"] == losses[0] and again.step == 1


def test_errors_name_the_argument(as_users_see_it):
    with pytest.raises(ValueError, match=r"make_step: ema_decay must be in \[0, 1\), got 1.5"):
        train.make_step(quadratic, optax.sgd(0.1), ema_decay=1.5)
    with pytest.raises(ValueError, match=r"init: params\['w'\] must be an array, got str"):
        train.init(KEY, {"w": "x"}, optax.sgd(0.1))
    with pytest.raises(ValueError, match="init: key"):
        train.init(jax.random.split(KEY), {"w": jnp.ones(1)}, optax.sgd(0.1))
