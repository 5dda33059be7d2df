"""Size: how large the update of the round in training is, over the Linears of a `lora.Stack`."""
import torch
import torch.nn.functional as F
from torch import Tensor

from lora import Stack


@torch.no_grad()
def core(stack: Stack) -> tuple[Tensor, Tensor]:
    """root = (A A^T)^1/2, and root B^T B root, whose eigenvalues are squared singular values of B @ A.

    [M, r, r] for the M Linears, in float64 on the CPU: r x r matrices are all that is needed of them."""
    grams = [(lora.A @ lora.A.T, lora.B.T @ lora.B) for lora in stack.layers.values()]      # [r, r] each
    AAt, BtB = (torch.stack([x.cpu() for x in xs]).double() for xs in zip(*grams))          # [M, r, r] each
    w, Q = torch.linalg.eigh(AAt)                                           # [M, r], [M, r, r]
    root = Q * w.clamp(min=0).sqrt()[:, None] @ Q.mT                        # [M, r, r]
    return root, root @ BtB @ root


def spectral(stack: Stack) -> Tensor:
    """Mean over Linears of the largest singular value of s * B @ A: a scalar with a gradient in A and B.

    sigma = u^T B A v holds to first order with the singular vectors u, v held constant, so they are found
    without a graph and without random numbers. At B = 0 value and gradient are 0.
    """
    root, squares = core(stack)
    top = (root @ torch.linalg.eigh(squares)[1][..., -1:])[..., 0]          # [M, r]   u is along B @ top
    sigmas = []
    for lora, z in zip(stack.layers.values(), top):
        A, B = lora.A.detach(), lora.B.detach()
        u = F.normalize(B @ z.to(B), dim=0, eps=1e-30)                      # [d_out]  stays 0 at B = 0
        v = F.normalize((u @ B) @ A, dim=0, eps=1e-30)                      # [d_in]
        sigmas.append((lora.scale * (u @ lora.B) @ (lora.A @ v)).to(stack.parameters()[0].device))
    return torch.stack(sigmas).mean()
