r"""One pass over a data set: log-density, posterior mean, residual trace and covariance products.

Notation: atoms $y_i$ with weights $p_i$, $\epsilon_i = (x - \alpha y_i)/\sigma$,
$w_i \propto p_i\,e^{-|\epsilon_i|^2/2}$. A piece of the data is summarised by its largest
log-weight $M$, its mass $W$ and its centred moments

$$ m = \sum_i w_i y_i, \qquad r = \sum_i w_i\,|\epsilon_i - \hat\epsilon|^2, \qquad
   c_v = \sum_i w_i\,(y_i - m)\,(y_i - m)\cdot v, $$

and two summaries merge exactly: with $D = m_b - m_a$ and shares $s_a + s_b = 1$ of the mass,

$$ m = m_a + s_b D, \quad r = s_a r_a + s_b r_b + s_a s_b \frac{\alpha^2}{\sigma^2} |D|^2, \quad
   c_v = s_a c_{v,a} + s_b c_{v,b} + s_a s_b\,D\,(D\cdot v). $$

So chunks of a scan and shards of a mesh give one answer, and nothing is got by subtracting raw
moments. All that touches the data is products of vectors with a chunk, which `jax.vmap` over
queries turns into products of matrices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from jaxdiff._array import Scalar, ScalarLike

__all__ = ["Moments", "all_reduce", "known", "merge", "nothing", "pass_over", "summarise", "widen"]

# Up to this dimension the differences x - alpha y are formed: cheap, and nothing cancels.
_SMALL = 32
# Atoms refined at a time, and the error in log-weights that is left alone, in units of d round-offs
# (which the squared length of d differences has anyway).
_REFINED, _TOLERANCE = 32, 1.0


class Moments(NamedTuple):
    r"""What a piece of the data knows of the posterior at one point.

    Attributes:
        top: largest log-weight of the piece, (), or near it.
        mass: sum of the weights divided by `exp(top)`, ().
        mean: $m$, (d,).
        residual: $r$, ().
        along: $m\cdot v$ of every direction, (k,).
        products: $c_v$ of every direction, (k, d).
        ratio: $\alpha^2/\sigma^2$, ().
    """

    top: Scalar
    mass: Scalar
    mean: Float[Array, " d"]
    residual: Scalar
    along: Float[Array, " k"]
    products: Float[Array, "k d"]
    ratio: Scalar

    @property
    def log_mass(self) -> Scalar:
        r"""$\log\sum_i p_i\,e^{-|\epsilon_i|^2/2}$."""
        return self.top + jnp.log(self.mass)


def nothing(
    alpha: ScalarLike, sigma: ScalarLike, x: Float[Array, " d"], vs: Float[Array, "k d"]
) -> Moments:
    """Return the summary of no atoms, neutral in `merge`."""
    zero = jnp.zeros((), x.dtype)
    ratio = jnp.asarray((alpha / sigma) ** 2, x.dtype)
    empty = jnp.full((), -jnp.inf, x.dtype)
    along = jnp.zeros(len(vs), x.dtype)
    return Moments(empty, zero, jnp.zeros_like(x), zero, along, jnp.zeros_like(vs), ratio)


def merge(a: Moments, b: Moments) -> Moments:
    """Combine the summaries of two disjoint pieces; associative and commutative to round-off."""
    top = jnp.maximum(a.top, b.top)
    mass_a = a.mass * jnp.exp(a.top - _finite(top))
    mass_b = b.mass * jnp.exp(b.top - _finite(top))
    mass = mass_a + mass_b
    share_a, share_b = (part / jnp.where(mass > 0, mass, 1) for part in (mass_a, mass_b))
    step, step_along = b.mean - a.mean, b.along - a.along
    both = share_a * share_b
    return Moments(
        top,
        mass,
        a.mean + share_b * step,
        share_a * a.residual + share_b * b.residual + both * a.ratio * jnp.sum(step**2),
        a.along + share_b * step_along,
        share_a * a.products + share_b * b.products + both * jnp.outer(step_along, step),
        a.ratio,
    )


def widen(atoms: Array, dtype: Any) -> Array:
    """Return a chunk of the data in `dtype`; uint16 holds the bits of bfloat16.

    The CPU compiler would widen a bfloat16 array whole before a loop cuts chunks out of it.
    """
    if atoms.dtype == jnp.uint16:
        atoms = jax.lax.bitcast_convert_type(atoms, jnp.bfloat16)
    return atoms.astype(dtype)


def _finite(top: Array) -> Array:
    return jnp.where(jnp.isfinite(top), top, 0)


def _log_kernel(alpha: ScalarLike, sigma: ScalarLike, x: Array, atoms: Array) -> Array:
    r"""Return $-|\epsilon_i|^2/2$ from differences: exact to round-off, a loop over (n, d)."""
    return -0.5 * jnp.sum(((x[None] - alpha * atoms) / sigma) ** 2, axis=-1)


def _refinement(
    alpha: ScalarLike,
    sigma: ScalarLike,
    x: Array,
    atoms: Array,
    squares: Array,
    log_weights: Array,
    log_p: Array,
    before: Moments,
) -> Array:
    r"""Return what is to be added to log-weights got from $|x|^2 - 2\alpha x\cdot y + \dots$.

    That form is a product of matrices, but loses $\delta = u\,(|x|^2 + \alpha^2|y|^2)/2\sigma^2$
    to round-off $u$, which at small sigma is fatal. There few atoms carry the mass: the heaviest
    are computed again from differences, until what $\delta$ can do to the mass of the rest,
    $\min(\delta, 1)\,e^\delta$ times it, is negligible.
    """
    unit = jnp.finfo(x.dtype).eps
    allowed = _TOLERANCE * x.size * unit
    error = unit * (jnp.sum(x**2) + alpha**2 * jnp.max(squares)) / (2 * sigma**2)
    count = min(_REFINED, len(atoms))

    def more(state: tuple[Array, Array]) -> Array:
        left, correction = state
        now = log_weights + correction
        top = _finite(jnp.maximum(before.top, jnp.max(now)))
        mass = before.mass * jnp.exp(before.top - top) + jnp.sum(jnp.exp(now - top))
        # exp(error) - 1 <= min(error, 1) exp(error) bounds the error of a weight
        rest = jnp.sum(jnp.exp(left - top + error))
        return jnp.minimum(error, 1.0) * rest > allowed * mass

    def refine(state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, correction = state
        _, heaviest = jax.lax.top_k(left, count)
        exact = _log_kernel(alpha, sigma, x, atoms[heaviest]) + log_p[heaviest]
        change = jnp.where(jnp.isfinite(exact), exact - log_weights[heaviest], 0)
        return left.at[heaviest].set(-jnp.inf), correction.at[heaviest].set(change)

    return jax.lax.while_loop(more, refine, (log_weights, jnp.zeros_like(log_weights)))[1]


def summarise(
    alpha: ScalarLike,
    sigma: ScalarLike,
    x: Float[Array, " d"],
    vs: Float[Array, "k d"],
    atoms: Float[Array, "n d"],
    log_p: Float[Array, " n"],
    before: Moments,
) -> Moments:
    r"""Summarise one piece of the data; entries of weight `-inf` do not count.

    Args:
        alpha: signal scale, ().
        sigma: noise scale, ().
        x: noisy sample, (d,).
        vs: directions $v$, (k, d).
        atoms: the piece, (n, d), best centred.
        log_p: $\log p_i$, (n,).
        before: other pieces, which say how much this one weighs, and so how precise its weights
            must be; `nothing` if there are none.
    """
    if x.size <= _SMALL:
        log_weights = _log_kernel(alpha, sigma, x, atoms) + log_p
    else:
        squares = jnp.sum(atoms**2, axis=-1)
        inner = jnp.matmul(x, atoms.T, precision="highest")
        expanded = jnp.sum(x**2) - 2 * alpha * inner + alpha**2 * squares
        log_weights = log_p - expanded / (2 * sigma**2)
        arguments = (alpha, sigma, x, atoms, squares, log_weights, log_p, before)
        # The correction undoes round-off in |x - alpha y|^2, hence is a constant over sigma^2.
        ratio = jax.lax.stop_gradient(sigma) / sigma
        log_weights += _refinement(*jax.lax.stop_gradient(arguments)) * ratio**2
    top = jax.lax.stop_gradient(jnp.max(log_weights))  # the result does not depend on it
    weights = jnp.exp(log_weights - _finite(top))
    mass = jnp.sum(weights)
    shares = weights / jnp.where(mass > 0, mass, 1)
    counts = weights > 0
    energies = -2 * jnp.where(counts, log_weights - jnp.where(counts, log_p, 0), 0)  # |eps_i|^2
    mean = jnp.matmul(shares, atoms, precision="highest")
    # r = E|eps_i - eps_n|^2 - |eps_n - eps|^2 from the heaviest atom n: no two large numbers
    nearest = jnp.argmax(weights)
    noise = (x - alpha * atoms[nearest]) / sigma
    step = alpha / sigma * (atoms[nearest] - mean)  # eps - eps_n
    gaps = jnp.where(counts, energies - energies[nearest], 0)
    residual = jnp.sum(shares * gaps) - jnp.sum(step * (2 * noise + step))
    projections = jnp.matmul(vs, atoms.T, precision="highest")
    along = jnp.sum(shares[None] * projections, axis=-1)
    centred = shares[None] * (projections - along[:, None])
    products = jnp.matmul(centred, atoms, precision="highest")
    products -= jnp.outer(jnp.sum(centred, axis=-1), mean)  # the shares sum to 1 + round-off
    return Moments(top, mass, mean, residual, along, products, before.ratio)


def pass_over(
    alpha: ScalarLike,
    sigma: ScalarLike,
    x: Float[Array, " d"],
    vs: Float[Array, "k d"],
    atoms: Real[Array, "chunks chunk d"],
    log_weights: Float[Array, "chunks chunk"],
) -> Moments:
    r"""Summarise a piece of a data set at one noisy sample, one chunk at a time.

    Log-weights that matter, and $r$, are accurate to about $d\,u$ at every sigma, $u$ being the
    round-off (see the private `_refinement`). The error of $\hat\epsilon = (x - \alpha m)/\sigma$
    is $u\,|x|/\sigma$, as much as rounding x itself makes; that of $\alpha^2 c_v/\sigma^2$ is of
    the same order.

    Args:
        alpha: signal scale, ().
        sigma: noise scale, ().
        x: noisy sample, (d,).
        vs: directions, (k, d); k may be 0.
        atoms: the data in equal chunks, (chunks, chunk, d), best centred: round-off is relative
            to the distance from the origin. See `widen` for 16 bits.
        log_weights: $\log p_i$, (chunks, chunk); `-inf` marks padding.

    Returns:
        The summary of all atoms; see `known` for where every weight underflows. Cost:
        $4(1 + k) N d$ operations in products of matrices, once the queries are batched, and at
        small sigma, where atoms are refined, $O(32 d)$ per round and chunk; memory is O(chunk d),
        whatever the number of atoms.
    """
    start = nothing(alpha, sigma, x, vs)

    def add(total: Moments, piece: tuple[Array, Array]) -> tuple[Moments, None]:
        chunk, log_p = widen(piece[0], x.dtype), piece[1].astype(x.dtype)
        return merge(total, summarise(alpha, sigma, x, vs, chunk, log_p, total)), None

    if len(atoms) == 1:
        total = add(start, (atoms[0], log_weights[0]))[0]
    else:
        # a reverse derivative keeps summaries, not chunks
        body = jax.checkpoint(add, prevent_cse=False)
        total = jax.lax.scan(body, start, (atoms, log_weights))[0]
    return total


def all_reduce(part: Moments, axis: str) -> Moments:
    r"""Merge the summaries that the devices along an axis of a mesh have of their pieces.

    With $s_a$ the shares of the mass, $m = \sum_a s_a m_a$ and $D_a = m_a - m$,

    $$ r = \sum_a s_a\left(r_a + \frac{\alpha^2}{\sigma^2}|D_a|^2\right), \qquad
       c_v = \sum_a s_a\left(c_{v,a} + D_a\,(D_a\cdot v)\right). $$

    Cost: four all-reduces, of $2 + d + k$ and $1 + k d$ numbers.
    """
    top = jax.lax.pmax(jax.lax.stop_gradient(part.top), axis)
    mine = part.mass * jnp.exp(part.top - _finite(top))
    mass = jax.lax.psum(mine, axis)
    share = mine / jnp.where(mass > 0, mass, 1)
    mean, along = jax.lax.psum((share * part.mean, share * part.along), axis)
    step, step_along = part.mean - mean, part.along - along
    residual = part.residual + part.ratio * jnp.sum(step**2)
    products = part.products + jnp.outer(step_along, step)
    residual, products = jax.lax.psum((share * residual, share * products), axis)
    return Moments(top, mass, mean, residual, along, products, part.ratio)


def known(total: Moments) -> Moments:
    """Return a summary with NaN for what is not known, so far away that every weight underflows."""
    hide = lambda a: jnp.where(total.mass > 0, a, jnp.nan)  # noqa: E731
    mean, residual, along, products = map(hide, total[2:6])
    return total._replace(mean=mean, residual=residual, along=along, products=products)
