"""The exact denoiser of the golden Gaussian mixture (its README), with the runs that guidance rules are tested on."""

import torch


class GaussianMixture:
    """Class k is N(mu_k, V_k diag(lam) V_k' + s0 I); the unconditional one weighs the classes by their posterior."""

    def __init__(self, vectors):
        self.vectors = {name: torch.as_tensor(array) for name, array in vectors.items()}
        self.sigmas = self.vectors["sigmas"]
        self.steps = len(self.sigmas) - 1

    def denoised(self, x, step):
        """Return x0 given each class, `(batch, 10, 64)`, and the weights of the classes without one, `(batch, 10)`."""
        v = self.vectors
        variance = self.sigmas[step] ** 2
        offset = x[:, None] - v["mu"]
        along = torch.einsum("bkd,kdr->bkr", offset, v["V"])
        gain = (v["lam"] + v["s0"]) / (v["lam"] + v["s0"] + variance)
        rest = v["s0"] / (v["s0"] + variance)
        inside = torch.einsum("bkr,kdr->bkd", along, v["V"])
        means = v["mu"] + torch.einsum("bkr,kdr->bkd", gain * along, v["V"]) + rest * (offset - inside)
        spread = v["lam"] + v["s0"] + variance
        distance = (along**2 / spread).sum(-1) + ((offset - inside) ** 2).sum(-1) / (v["s0"] + variance)
        return means, torch.softmax(-distance / 2 * v["posterior_temp"], dim=1)

    def predictions(self, x, y, step):
        means, weights = self.denoised(x, step)
        return means[torch.arange(len(y)), y], (weights[..., None] * means).sum(1)

    def step(self, x, guided, step):
        return guided + (x - guided) * self.sigmas[step + 1] / self.sigmas[step]

    def run(self, x, y, guide):
        """Return the end of a run; `guide(step, cond, uncond, x)` returns the guided x0."""
        for step in range(self.steps):
            x = self.step(x, guide(step, *self.predictions(x, y, step), x), step)
        return x
