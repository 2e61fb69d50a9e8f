import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import process, score
from jaxdiff.train import nets

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)
TIMES = jnp.linspace(-1.3, 1.3, 4, dtype=jnp.float32)
LABELS = jnp.array([0, 1, 2, 3])
NETS = {
    "mlp": lambda **k: nets.MLP((16, 16), **k),
    "unet": lambda **k: nets.UNet((8, 16), attention=True, **k),
    "one_level": lambda **k: nets.UNet((8,), blocks=2, **k),
}
each_net = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


def shaken(net, *args):
    """Parameters with no zeros, so that every input matters."""
    shapes = jax.eval_shape(net.init, KEY, *args)["params"]
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(shapes))
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda a: 0.3 * noise.normal(size=a.shape).astype(a.dtype), shapes)


@pytest.mark.parametrize("make", [nets.MLP, nets.UNet])
def test_output_starts_at_zero(make):
    net = make((8,), num_classes=3)
    out, _ = jax.jit(net.init_with_output)(KEY, TIMES, IMAGES, LABELS)
    assert out.shape == IMAGES.shape and out.dtype == IMAGES.dtype and not np.any(out)


@each_net
def test_output_depends_on_every_input_of_its_own_example(make):
    net = make(num_classes=3)
    params = {"params": shaken(net, TIMES, IMAGES, LABELS)}
    apply = jax.jit(net.apply)
    base = apply(params, TIMES, IMAGES, LABELS)
    changed = [
        apply(params, TIMES.at[1].add(0.05), IMAGES, LABELS),
        apply(params, TIMES, IMAGES.at[1, 0, 0].add(1.0), LABELS),
        apply(params, TIMES, IMAGES, LABELS.at[1].set(3)),  # "no class"
    ]
    for other in changed:
        differs = np.max(np.abs(other - base), axis=(1, 2, 3)) / np.max(np.abs(base))
        assert differs[1] > 1e-3 and np.max(differs[[0, 2, 3]]) < 1e-5


@each_net
def test_per_sample_denoiser_equals_the_batch(make):
    net, path = make(), process.VP()
    params = shaken(net, TIMES, IMAGES)

    @jax.jit
    def both(params):
        inner = score.from_linen(net, {"params": params})
        denoiser = score.Denoiser(path, score.precondition(path, inner, 0.5))
        slope = jax.grad(lambda x: jnp.sum(denoiser(0.3, x) ** 2))(IMAGES[0])
        return jax.vmap(inner)(TIMES, IMAGES), net.apply({"params": params}, TIMES, IMAGES), slope

    single, batched, slope = both(params)
    assert jnp.max(jnp.abs(single - batched)) < 1e-5 * jnp.max(jnp.abs(batched))
    assert np.all(np.isfinite(slope)) and np.any(slope)


@each_net
def test_bfloat16_computes_near_float32(make):
    net, low = make(), make(dtype=jnp.bfloat16)
    params = {"params": shaken(low, TIMES, IMAGES)}
    exact, rough = (jax.jit(n.apply)(params, TIMES, IMAGES) for n in (net, low))
    assert exact.dtype == rough.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(rough - exact) < 0.05 * jnp.linalg.norm(exact)


def test_mlp_takes_any_dims_and_float64():
    net = nets.MLP((8, 4))
    t, x = jnp.zeros(3), jnp.ones((3, 2, 5))
    params = shaken(net, t, x)
    assert net.apply({"params": params}, t, x).dtype == jnp.float64


def test_time_scale_and_features():
    t = jnp.linspace(-1.3, 1.3, 200)
    features = nets.time_features(t)
    gaps = jnp.linalg.norm(features[:, None] - features[None], axis=-1) + 9 * jnp.eye(200)
    assert features.shape == (200, 32) and jnp.min(gaps) > 0.3  # a step of 0.013 is seen
    params = shaken(nets.MLP((8,)), TIMES, IMAGES)
    once = nets.MLP((8,), time_scale=10.0).apply({"params": params}, TIMES / 10, IMAGES)
    np.testing.assert_allclose(
        once, nets.MLP((8,)).apply({"params": params}, TIMES, IMAGES), rtol=1e-3, atol=1e-4
    )


@each_net
def test_features_are_what_the_last_layer_reads(make):
    net = make(num_classes=3)
    params = shaken(net, TIMES, IMAGES, LABELS)
    plain = jax.jit(net.apply)({"params": params}, TIMES, IMAGES, LABELS)
    both = jax.jit(lambda p: net.apply({"params": p}, TIMES, IMAGES, LABELS, features=True))
    out, hidden = both(params)
    np.testing.assert_array_equal(out, plain)
    width = 16 if isinstance(net, nets.MLP) else net.channels[0]
    assert hidden.shape == ((4, width) if isinstance(net, nets.MLP) else (4, 8, 8, width))
    if isinstance(net, nets.MLP):
        last = max(params, key=lambda name: int(name.split("_")[-1]) * name.startswith("Dense"))
        want = hidden @ params[last]["kernel"]
    else:
        last, sizes = "Conv_1", ("NHWC", "HWIO", "NHWC")
        kernel = params[last]["kernel"]
        want = jax.lax.conv_general_dilated(hidden, kernel, (1, 1), "SAME", dimension_numbers=sizes)
    want = np.asarray(want) + np.asarray(params[last]["bias"])
    np.testing.assert_allclose(out, want.reshape(out.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [(6,), (4, 4, 6), (3, 4, 4, 6)])
def test_trace_net_gives_one_number_per_sample(dims):
    net, x = nets.TraceNet(16, num_classes=3), np.random.default_rng(0).normal(size=(4, *dims))
    x = jnp.asarray(x, jnp.float32)
    params = {"params": shaken(net, TIMES, x, LABELS)}
    apply = jax.jit(net.apply)
    base = apply(params, TIMES, x, LABELS)
    assert base.shape == (4,) and base.dtype == jnp.float32
    for other in (
        apply(params, TIMES.at[1].add(0.05), x, LABELS),
        apply(params, TIMES, x.at[1].multiply(-1.0), LABELS),
        apply(params, TIMES, x, LABELS.at[1].set(3)),
    ):
        differs = np.abs(other - base) / np.max(np.abs(base))
        assert differs[1] > 1e-3 and np.max(differs[[0, 2, 3]]) < 1e-5
    single = score.from_linen(net, params)
    got = jax.vmap(single)(TIMES, x, LABELS)
    np.testing.assert_allclose(got, base, rtol=1e-5, atol=1e-6)
    zero, _ = net.init_with_output(KEY, TIMES, x, LABELS)
    assert not np.any(zero)
    low = nets.TraceNet(16, num_classes=3, dtype=jnp.bfloat16)
    rough = low.apply(params, TIMES, x, LABELS)
    assert rough.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(rough - base) < 0.05 * jnp.linalg.norm(base)
    assert net.apply(params, TIMES.astype(float), x.astype(float), LABELS).dtype == jnp.float64


@pytest.mark.parametrize(
    "net,x,cond,message",
    [
        (nets.UNet((8, 8, 8)), (4, 8, 6, 1), None, "UNet: x .* divisible by 4, got .4, 8, 6, 1"),
        (nets.UNet((8, 12)), (4, 8, 8, 1), None, "UNet: channels must be multiples of groups=8"),
        (nets.MLP((8,), num_classes=3), (4, 2), None, "net: cond must be integer labels 0..3"),
        (nets.MLP((8,)), (4, 2), LABELS, "net: cond must be None as num_classes is None"),
        (nets.MLP((8,), num_classes=3), (4, 2), LABELS[:2], r"shape \(4,\), got int64\[2\]"),
        (nets.MLP((8,)), (5, 2), None, r"net: t must be of shape \(n,\) = \(5,\), got \(4,\)"),
    ],
)
def test_errors(as_users_see_it, net, x, cond, message):
    with pytest.raises(ValueError, match=message):
        net.init(KEY, TIMES, jnp.zeros(x), cond)
