"""Products with matrices of low displacement rank.

    W(G, H) = sum_i C(g_i) S(h_i),  C circulant and S skew-circulant, i = 1..q

Source: SURM (Sehanobish et al. 2024), section 3: rank(Z_1 W - W Z_-1) <= q for the cyclic shifts Z_f whose corner is f.
All transforms are shared: x is transformed once, the sum is formed in the frequency domain.
"""

from . import engine
from .engine import STRUCTURES, check_input


def _plain_ldr(x, G, H, n):
    circulant, skew = STRUCTURES["circulant"].plain, STRUCTURES["skew_circulant"].plain
    return sum(circulant(skew(x, h, None, n), g, None, n) for g, h in zip(G, H, strict=True))


def ldr_matmul(x, G, H, *, add=None, scale=1.0, dropout_p=0.0, seed=None, transposed=False):
    """add + scale * sum_i C(G[i]) S(H[i]) drop(x), differentiable in x, G, H and add.

    x: [..., n]; G, H: [q, n] with q >= 1. On Triton each term is one kernel. The rest: see `circulant_matmul`.
    """
    return engine.run("ldr", x, G, H, add=add, scale=scale, dropout_p=dropout_p, seed=seed, transposed=transposed)


def _outputs(x, G, H, out_features, transposed, names) -> int:
    engine.check_parameter("G", G, (2,), "[q, n]")
    engine.check_parameter("H", H, (2,), "[q, n]")
    if G.shape != H.shape:
        raise ValueError(f"H must have G's shape {list(G.shape)}, got {list(H.shape)}")
    check_input(x, G.shape[1], "the columns of G and H")
    return G.shape[1]


def ldr_matmul_reference(x, G, H, **options):
    """`ldr_matmul` written down in plain PyTorch, differentiated by autograd. Same arguments, same result."""
    return engine.reference("ldr", x, G, H, **options)


engine.register("ldr", ("G", "H"), _plain_ldr, _outputs)
