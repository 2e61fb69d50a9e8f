"""Low-rank operators: against dense algebra, the atoms themselves, and a bound that must hold."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from helpers import PROCESSES

import jaxdiff as jd
from jaxdiff import exact
from jaxdiff.fisher.atoms import effective_sample_size, neighbours
from jaxdiff.fisher.operators import fisher, posterior_cov, solve
from jaxdiff.linalg.diag_low_rank import DiagLowRank, determinant
from jaxdiff.linalg.estimators import diagonal
from jaxdiff.linalg.spectrum import lanczos, tridiagonalise

VP = PROCESSES["VP"]
D, N = 6, 200
RNG = np.random.default_rng(0)
ATOMS = RNG.normal(size=(N, D))
PRIOR = RNG.uniform(0.5, 2.0, N)


def state(lam, seed=0, atoms=ATOMS):
    t = VP.t_of_lam(lam)
    rng = np.random.default_rng(seed)
    y = atoms[rng.integers(len(atoms))]
    return t, jnp.asarray(VP.alpha(t) * y + VP.sigma(t) * rng.normal(size=y.shape))


def by_hand(t, x, atoms=ATOMS, prior=PRIOR):
    """Weights of all atoms and the covariance of their noise, in NumPy."""
    alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
    noise = (np.asarray(x)[None] - alpha * atoms) / sigma
    logits = np.log(prior) - 0.5 * np.sum(noise**2, axis=1)
    w = np.exp(logits - logits.max())
    w /= w.sum()
    centred = noise - w @ noise
    return w, noise, centred.T @ (w[:, None] * centred)


def operator(shape=(2, 3), k=3, shift=0.7, seed=0, dtype=None):
    rng = np.random.default_rng(seed)
    factors, weights = rng.normal(size=(k, *shape)), rng.uniform(-0.1, 0.5, k)
    return DiagLowRank(*(jnp.asarray(a, dtype) for a in (np.float64(shift), factors, weights)))


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# --- The operator. ------------------------------------------------------------------------------


def test_it_is_a_lineax_operator():
    a = operator()
    dense = a.as_matrix()
    u = np.asarray(a.factors).reshape(3, 6)
    want = 0.7 * np.eye(6) + sum(w * np.outer(r, r) for w, r in zip(a.weights, u, strict=True))
    np.testing.assert_allclose(dense, want, rtol=1e-13, atol=1e-15)
    v = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(a.mv(v).reshape(-1), dense @ v.reshape(-1), rtol=1e-13)
    assert a.T is a and a.in_structure().shape == (2, 3) == a.out_structure().shape
    np.testing.assert_allclose(lx.diagonal(a), np.diag(dense), rtol=1e-13)
    middle, low, up = lx.tridiagonal(a)
    np.testing.assert_allclose(middle, np.diag(dense), rtol=1e-13)
    np.testing.assert_allclose(low, np.diag(dense, -1), rtol=1e-12)
    np.testing.assert_allclose(up, np.diag(dense, 1), rtol=1e-12)
    for same in (lx.linearise(a), lx.materialise(a), lx.conj(a)):
        assert same is a
    assert lx.is_symmetric(a) and not lx.is_positive_semidefinite(a)
    assert not any(
        ask(a)
        for ask in (
            lx.is_diagonal,
            lx.is_tridiagonal,
            lx.is_lower_triangular,
            lx.is_upper_triangular,
            lx.has_unit_diagonal,
            lx.is_negative_semidefinite,
        )
    )
    tagged = DiagLowRank(a.shift, a.factors, a.weights, frozenset({lx.positive_semidefinite_tag}))
    assert lx.is_positive_semidefinite(tagged)
    np.testing.assert_allclose((2 * a + tagged).mv(v), 3 * a.mv(v), rtol=1e-13)
    out = lx.linear_solve(tagged, v, lx.CG(rtol=1e-10, atol=1e-10))
    np.testing.assert_allclose(a.mv(out.value), v, rtol=1e-8, atol=1e-8)
    out = lx.linear_solve(a, v, lx.AutoLinearSolver(well_posed=True))
    np.testing.assert_allclose(a.mv(out.value), v, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("k, shift", [(1, 0.0), (3, 0.2), (5, -0.2), (6, -0.7), (9, 0.1)])
def test_woodbury_and_determinant_are_dense_algebra(k, shift):
    """Section 9.9: to round-off, below, at and above full rank."""
    a = operator(k=k)
    dense = np.asarray(a.as_matrix()) + shift * np.eye(6)
    v = np.arange(1.0, 7.0).reshape(2, 3)
    got = jax.jit(lambda v: solve(a, v, shift=shift))(v)
    want = np.linalg.solve(dense, v.reshape(-1))
    assert relative(got.reshape(-1), want) < 2e-15 * np.linalg.cond(dense)
    sign, value = np.linalg.slogdet(dense)
    got = determinant(a, shift)
    np.testing.assert_allclose(got, value if sign > 0 else np.nan, rtol=1e-12, atol=1e-13)


def test_woodbury_in_48_dimensions():
    rng = np.random.default_rng(2)
    u = rng.normal(size=(12, 48)) / 48**0.5
    a = DiagLowRank(jnp.asarray(3.0), jnp.asarray(u), -jnp.ones(12))
    v = rng.normal(size=48)
    assert relative(solve(a, v, shift=0.5), np.linalg.solve(3.5 * np.eye(48) - u.T @ u, v)) < 3e-15


def test_derivatives_and_batches_of_the_operator():
    v = jnp.arange(1.0, 7.0).reshape(2, 3)

    def values(a):
        return jnp.stack(
            [
                jnp.sum(a.mv(v) ** 2),
                jnp.sum(diagonal(a)[0] ** 2),
                jnp.sum(solve(a, v, shift=0.1)),
                determinant(a, 0.1),
            ]
        )

    def dense(a):
        matrix = a.as_matrix()
        shifted = matrix + 0.1 * jnp.eye(6)
        return jnp.stack(
            [
                jnp.sum((matrix @ v.reshape(-1)) ** 2),
                jnp.sum(jnp.diag(matrix) ** 2),
                jnp.sum(jnp.linalg.solve(shifted, v.reshape(-1))),
                jnp.linalg.slogdet(shifted)[1],
            ]
        )

    a = operator()
    got, want = jax.jit(jax.jacrev(values))(a), jax.jacrev(dense)(a)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-11)
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), a, operator(seed=1))
    got = jax.vmap(values)(many)
    np.testing.assert_allclose(got, [values(a), values(operator(seed=1))], rtol=1e-12)


def test_float32_operators_stay_float32():
    wide, low = operator(), operator(dtype=jnp.float32)
    v = jnp.arange(1.0, 7.0, dtype=jnp.float32).reshape(2, 3)
    wide = jax.tree.map(lambda a: a.astype(float), low)
    for got, want in (
        (low.mv(v), wide.mv(v)),
        (solve(low, v, shift=0.1), solve(wide, v, shift=0.1)),
        (diagonal(low)[0], diagonal(wide)[0]),
        (determinant(low, 0.1), determinant(wide, 0.1)),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=2e-6)


# --- The nearest atoms. --------------------------------------------------------------------------


@pytest.mark.parametrize("chunk, rank", [(200, 7), (16, 7), (7, 30), (3, 5)])
def test_the_kept_atoms_are_the_heaviest(chunk, rank):
    denoiser = exact.empirical(VP, ATOMS, PRIOR, chunk=chunk)
    t, x = state(0.0)
    w, noise, _ = by_hand(t, x)
    kept = np.argsort(-w)[:rank]
    got = jax.jit(lambda x: neighbours(denoiser, t, x, rank=rank))(x)
    share = w[kept] / w[kept].sum()
    np.testing.assert_allclose(got.covariance.weights, share, rtol=1e-10)
    centred = noise[kept] - share @ noise[kept]
    np.testing.assert_allclose(got.covariance.factors, centred, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got.dropped, np.delete(w, kept).sum(), rtol=1e-10)
    np.testing.assert_allclose(effective_sample_size(denoiser, t, x), 1 / (w @ w), rtol=1e-10)


def test_all_atoms_are_the_whole_covariance():
    weights = np.where(np.arange(20) < 15, 1.0, 0.0)  # some with no mass, and padding beside
    denoiser = exact.empirical(VP, ATOMS[:20].reshape(20, 2, 3), weights, chunk=8)
    t, x = state(-0.5, atoms=ATOMS[:20])
    kept = neighbours(denoiser, t, x.reshape(2, 3), rank=24)
    _, _, want = by_hand(t, x, ATOMS[:15], weights[:15])
    np.testing.assert_allclose(kept.covariance.as_matrix(), want, rtol=1e-10, atol=1e-13)
    assert kept.dropped == 0 and kept.bound == 0
    for build, tag in ((fisher, lx.is_symmetric), (posterior_cov, lx.is_positive_semidefinite)):
        low = build(denoiser, t, x.reshape(2, 3), method="neighbours", rank=15)
        full = build(denoiser, t, x.reshape(2, 3), method="exact")
        assert isinstance(low, DiagLowRank) and tag(low)
        assert relative(low.as_matrix(), full.as_matrix()) < 1e-12
        assert low.in_structure().shape == (2, 3)
    assert not lx.is_positive_semidefinite(fisher(denoiser, t, x.reshape(2, 3), method="exact"))


def test_the_bound_holds_and_says_something():
    """Section 9.8, on random states, from a spread posterior to a collapsed one."""
    denoiser = exact.empirical(VP, ATOMS, PRIOR, chunk=32)
    both = jax.jit(lambda t, x: [neighbours(denoiser, t, x, rank=k) for k in (4, 16, 64)])
    ratios = []
    for seed, lam in enumerate(np.linspace(-1.5, 1.5, 25)):
        t, x = state(lam, seed)
        w, noise, full = by_hand(t, x)
        for k, got in zip((4, 16, 64), both(t, x), strict=True):
            error = np.linalg.norm(full - got.covariance.as_matrix(), 2)
            assert error <= got.bound + 1e-14 * np.linalg.norm(full, 2)
            kept, rest = np.argsort(-w)[:k], np.argsort(-w)[k:]
            m_in, m_out = (w[i] @ noise[i] / w[i].sum() for i in (kept, rest))
            p, step = w[rest].sum(), m_out - m_in
            out = (noise[rest] - m_out).T @ ((w[rest] / p)[:, None] * (noise[rest] - m_out))
            # the identity of 9.8 behind it
            inside = np.asarray(got.covariance.as_matrix())
            mix = (1 - p) * inside + p * out + p * (1 - p) * np.outer(step, step)
            assert np.linalg.norm(mix - full) < 1e-12 * np.linalg.norm(full)
            if error > 1e-10:
                ratios.append(float(got.bound) / error)
    assert len(ratios) > 30 and np.median(ratios) < 10  # it is no constant


def test_a_mass_below_round_off_is_still_seen():
    denoiser = exact.empirical(VP, ATOMS, PRIOR)
    t, x = state(2.5)
    w, *_ = by_hand(t, x)
    dropped = float(neighbours(denoiser, t, x, rank=3).dropped)
    want = np.sort(w)[:-3].sum()
    assert 0 < want < 1e-17 and abs(dropped / want - 1) < 1e-8


def test_neighbours_under_grad_vmap_and_in_float32():
    denoiser = exact.empirical(VP, ATOMS, PRIOR, chunk=64)
    t, x = state(0.0)
    v = jnp.ones(D)

    @jax.jit
    def values(x):
        low = neighbours(denoiser, t, x, rank=8)
        extra = effective_sample_size(denoiser, t, x)
        return jnp.stack([v @ low.covariance.mv(v), low.dropped, low.bound, extra])

    h = 1e-5
    want = (values(x + h * v) - values(x - h * v)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.jacrev(values))(x) @ v, want, rtol=1e-6, atol=1e-9)
    xs = jnp.stack([x, x + 0.1])
    np.testing.assert_allclose(jax.vmap(values)(xs), [values(y) for y in xs], rtol=1e-10)
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (denoiser, x))
    got = neighbours(low[0], t, low[1], rank=8)
    full = neighbours(denoiser, t, x, rank=8)
    assert got.covariance.factors.dtype == got.dropped.dtype == got.bound.dtype == jnp.float32
    assert relative(got.covariance.as_matrix(), full.covariance.as_matrix()) < 1e-5
    np.testing.assert_allclose([got.dropped, got.bound], full[1:], rtol=1e-4)
    assert effective_sample_size(low[0], t, low[1]).dtype == jnp.float32


# --- Lanczos. ------------------------------------------------------------------------------------


def test_lanczos_is_matfree_where_both_are_defined():
    from matfree import decomp

    rng = np.random.default_rng(3)
    root = rng.normal(size=(10, 10))
    a = jnp.asarray(root @ root.T)
    v = jnp.asarray(rng.normal(size=10))
    rows, t = tridiagonalise(lx.MatrixLinearOperator(a, lx.symmetric_tag), v, 6)
    other = decomp.tridiag_sym(6, reortho="full")(lambda s: a @ s, v)
    np.testing.assert_allclose(rows, other.Q_tall, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(t, other.J_small, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("diagonals", [[0.3] * 8, [0.0] * 8, [1.0, 1.0, 0.5] + [0.0] * 5])
def test_lanczos_goes_on_where_the_krylov_space_ends(diagonals):
    a = lx.MatrixLinearOperator(jnp.diag(jnp.asarray(diagonals)), lx.positive_semidefinite_tag)
    low = lanczos(a, 5)
    np.testing.assert_allclose(low.factors @ low.factors.T, np.eye(5), atol=1e-14)
    want = diagonals[:5] if len(set(diagonals)) == 1 else sorted(diagonals)[-5:]
    np.testing.assert_allclose(low.weights, want, atol=1e-15)  # a double eigenvalue, twice
    full = lanczos(a, 8).as_matrix()
    np.testing.assert_allclose(full, a.as_matrix(), atol=1e-14)


@pytest.mark.parametrize("method", ["exact", "network"])
def test_lanczos_of_data_on_few_dimensions(method):
    """R of 4 atoms has rank 3: 4 products give it, and F, exactly."""
    denoiser = exact.empirical(VP, ATOMS[:4].reshape(4, 2, 3))
    t, x = state(-0.5, atoms=ATOMS[:4])
    x = x.reshape(2, 3)
    model = denoiser
    if method == "network":
        model = jd.Denoiser(VP, lambda t, x, cond: denoiser.eps(t, x), "eps")
    for build, tagged in ((fisher, False), (posterior_cov, method == "exact")):
        low = jax.jit(lambda x, build=build: build(model, t, x, method="lanczos", rank=4))(x)
        want = build(denoiser, t, x, method="exact").as_matrix()
        assert relative(low.as_matrix(), want) < 1e-10
        assert lx.is_symmetric(low) and lx.is_positive_semidefinite(low) == tagged
    v = jnp.ones((2, 3))
    exactly = fisher(denoiser, t, x, method="exact")
    got = solve(fisher(model, t, x, method="lanczos", rank=4), v, shift=4.0)
    np.testing.assert_allclose(exactly.mv(got) + 4.0 * got, v, rtol=1e-9)


def test_the_default_start_sees_what_symmetry_hides_from_the_state():
    """Two modes that mirror each other: R is largest across, where the noise has no part."""
    denoiser = exact.mixture(VP, [0.5, 0.5], [[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]], 0.05)
    t = VP.t_of_lam(0.0)
    x = jnp.asarray([0.0, 0.4, -0.3])  # on the mirror
    operator = lx.FunctionLinearOperator(
        denoiser.noise_covariance(t, x), jax.ShapeDtypeStruct((3,), x.dtype), lx.symmetric_tag
    )
    top = np.linalg.eigvalsh(operator.as_matrix())[-1]
    rows, tri = tridiagonalise(operator, denoiser.eps(t, x), 1)
    assert abs(rows[0, 0]) < 1e-12 and tri[0, 0] < 0.1 * top
    np.testing.assert_allclose(lanczos(operator, 2).weights[-1], top, rtol=1e-10)
    other = lanczos(operator, 2, key=jax.random.key(5)).weights[-1]
    np.testing.assert_allclose(other, top, rtol=1e-10)


def test_lanczos_under_grad_vmap_and_in_float32():
    denoiser = exact.empirical(VP, ATOMS, PRIOR, chunk=64)
    t, x = state(0.0)
    v = jnp.arange(1.0, D + 1) / D

    @jax.jit
    def value(x):
        return v @ posterior_cov(denoiser, t, x, method="lanczos", rank=3).mv(v)

    h = 1e-5
    want = (value(x + h * v) - value(x - h * v)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(value))(x) @ v, want, rtol=1e-6)
    xs = jnp.stack([x, x + 0.1])
    np.testing.assert_allclose(jax.vmap(value)(xs), [value(y) for y in xs], rtol=1e-10)
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (denoiser, x))
    got = posterior_cov(low[0], t, low[1], method="lanczos", rank=D)
    assert got.factors.dtype == jnp.float32
    full = posterior_cov(denoiser, t, x, method="lanczos", rank=D)
    assert relative(got.as_matrix(), full.as_matrix()) < 1e-5


def test_errors(as_users_see_it):
    denoiser = exact.empirical(VP, ATOMS)
    mixture = exact.gaussian(VP, np.zeros(D), 1.0)
    plain = lx.MatrixLinearOperator(jnp.eye(3))
    good = lx.MatrixLinearOperator(jnp.eye(3), lx.symmetric_tag)
    x = jnp.zeros(D)
    for call, said in [
        (lambda: neighbours(mixture, 0.5, x, rank=2), "neighbours: denoiser must be"),
        (lambda: neighbours(denoiser, 0.5, x, rank=0), "rank must be a whole number"),
        (lambda: neighbours(denoiser, 0.5, x, rank=999), "rank must be at most.* 999"),
        (lambda: neighbours(denoiser, 0.5, x[:3], rank=2), r"x must be of shape \(6,\)"),
        (lambda: effective_sample_size(mixture, 0.5, x), "effective_sample_size: denoiser"),
        (lambda: lanczos(plain, 2), "lanczos: operator must be tagged symmetric"),
        (lambda: lanczos(good, 4), "rank must be at most the dimension 3, got 4"),
        (lambda: lanczos(good, 2, key=3), "lanczos: key must be a key"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
