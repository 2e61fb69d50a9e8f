"""Independent float64 truths: a Gaussian mixture seen through a Gaussian path.

Nothing here knows of `jaxdiff`. Two derivations that share no line are offered for the same
quantities: autodiff of the log density (JAX), and conditioning of the joint Gaussian of
`(x0, x_t)` (NumPy). `alpha` and `sigma` are plain numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats


@dataclasses.dataclass(frozen=True)
class GaussianMixture:
    """Data law `sum_k w_k N(mu_k, C_k)` on R^d.

    Attributes:
        weights: (k,), summing to 1.
        means: (k, d).
        covs: (k, d, d); use `isotropic` and `diagonal` for the smaller forms.
    """

    weights: np.ndarray
    means: np.ndarray
    covs: np.ndarray

    @classmethod
    def isotropic(cls, weights, means, variances):
        """Components `N(mu_k, v_k I)`, variances (k,); 0 is a Dirac."""
        eye = np.eye(np.shape(means)[1])
        return cls.full(weights, means, np.asarray(variances)[:, None, None] * eye[None])

    @classmethod
    def diagonal(cls, weights, means, variances):
        """Components with variances (k, d)."""
        return cls.full(weights, means, np.stack([np.diag(v) for v in np.asarray(variances)]))

    @classmethod
    def full(cls, weights, means, covs):
        """Components with covariances (k, d, d)."""
        weights, means, covs = (np.asarray(a, np.float64) for a in (weights, means, covs))
        return cls(weights / weights.sum(), means, covs)

    @classmethod
    def random(cls, seed, k, d, kind="full"):
        """A mixture with well separated, anisotropic components, for tests."""
        rng = np.random.default_rng(seed)
        weights, means = rng.uniform(0.5, 1.5, k), 2 * rng.standard_normal((k, d))
        if kind == "isotropic":
            return cls.isotropic(weights, means, rng.uniform(0.1, 0.6, k))
        if kind == "diagonal":
            return cls.diagonal(weights, means, rng.uniform(0.1, 0.6, (k, d)))
        root = rng.standard_normal((k, d, d)) / d**0.5
        return cls.full(weights, means, root @ root.transpose(0, 2, 1) + 0.05 * np.eye(d)[None])

    @property
    def dim(self):
        """Number of coordinates."""
        return self.means.shape[1]

    def moments(self):
        """Mean (d,) and covariance (d, d) of the data."""
        return _collapse(self.weights, self.means, self.covs)

    def sample(self, seed, n):
        """Draw (n, d) with a NumPy generator."""
        rng = np.random.default_rng(seed)
        which = rng.choice(len(self.weights), size=n, p=self.weights)
        roots = np.stack([_root(c) for c in self.covs])
        z = rng.standard_normal((n, self.dim))
        return self.means[which] + np.einsum("nij,nj->ni", roots[which], z)

    # --- Autodiff of the density. ---

    def log_density(self, x, alpha, sigma):
        """Log q(x) of `alpha x0 + sigma eps` as a JAX function of x (d,), for autodiff."""
        terms = []
        for w, mu, cov in zip(self.weights, self.means, self.covs, strict=True):
            total = alpha**2 * cov + sigma**2 * np.eye(self.dim)
            log_normal = jax.scipy.stats.multivariate_normal.logpdf(x, alpha * mu, total)
            terms.append(jnp.log(w) + log_normal)
        return jax.scipy.special.logsumexp(jnp.stack(terms))

    def score(self, x, alpha, sigma):
        """Gradient of `log_density`, (d,)."""
        return np.asarray(jax.grad(self.log_density)(jnp.asarray(x), alpha, sigma))

    def fisher(self, x, alpha, sigma):
        """Minus the Hessian of `log_density`, (d, d)."""
        return -np.asarray(jax.hessian(self.log_density)(jnp.asarray(x), alpha, sigma))

    # --- Conditioning of the joint Gaussian. ---

    def log_prob(self, x, alpha, sigma):
        """Log q(x), by SciPy."""
        return float(scipy.special.logsumexp(self._log_joint(x, alpha, sigma)))

    def responsibilities(self, x, alpha, sigma):
        """Posterior probability of each component, (k,)."""
        return scipy.special.softmax(self._log_joint(x, alpha, sigma))

    def posterior(self, x, alpha, sigma):
        """The law of x0 given x, again a mixture."""
        means, covs = [], []
        for mu, cov in zip(self.means, self.covs, strict=True):
            # Cov[(x0, x)] = [[C, alpha C], [alpha C, alpha^2 C + sigma^2 I]].
            total = alpha**2 * cov + sigma**2 * np.eye(self.dim)
            gain = np.linalg.solve(total, alpha * cov).T
            means.append(mu + gain @ (np.asarray(x, np.float64) - alpha * mu))
            covs.append(cov - gain @ (alpha * cov))
        weights = self.responsibilities(x, alpha, sigma)
        return GaussianMixture(weights, np.stack(means), np.stack(covs))

    def posterior_mean(self, x, alpha, sigma):
        """E[x0 | x], (d,)."""
        return self.posterior(x, alpha, sigma).moments()[0]

    def posterior_cov(self, x, alpha, sigma):
        """Cov[x0 | x], (d, d)."""
        return self.posterior(x, alpha, sigma).moments()[1]

    def _log_joint(self, x, alpha, sigma):
        logs = [
            scipy.stats.multivariate_normal.logpdf(
                np.asarray(x, np.float64), alpha * mu, alpha**2 * cov + sigma**2 * np.eye(self.dim)
            )
            for mu, cov in zip(self.means, self.covs, strict=True)
        ]
        return np.log(self.weights) + np.array(logs)


def _collapse(weights, means, covs):
    """Mean and covariance of a mixture, by the law of total variance."""
    mean = weights @ means
    spread = means - mean[None]
    within = np.einsum("k,kij->ij", weights, covs)
    return mean, within + np.einsum("k,ki,kj->ij", weights, spread, spread)


def _root(cov):
    """A square root that survives zero eigenvalues."""
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(np.maximum(values, 0.0))[None, :]
