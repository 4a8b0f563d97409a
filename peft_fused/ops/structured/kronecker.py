"""Products with a Kronecker product of two matrices.

    W = B (x) A,  A [a1, a2], B [b1, b2]      W x = flatten(B X A^T), X = x viewed as [b2, a2]

Source: SURM (Sehanobish et al. 2024), section 3. The rank is rank(A) rank(B). With Y = dy viewed as [b1, a1]:
dX = B^T Y A, dA = Y^T B X, dB = Y A X^T, summed over rows.
"""

from . import engine
from .engine import check_input


def _plain_kronecker(x, A, B, n):
    x = x.unflatten(-1, (B.shape[1], A.shape[1]))
    return (B @ x @ A.mT).flatten(-2)


def kronecker_matmul(x, A, B, *, add=None, scale=1.0, dropout_p=0.0, seed=None, transposed=False):
    """add + scale * (B (x) A) drop(x), differentiable in x, A, B and add.

    x: [..., a2 b2]; A: [a1, a2], B: [b1, b2] in x's dtype or fp32, in which the products are computed. add: [...,
    a1 b1]. The rest: see `circulant_matmul`. transposed: x [..., a1 b1] gives [..., a2 b2].
    """
    return engine.run("kronecker", x, A, B, add=add, scale=scale, dropout_p=dropout_p, seed=seed, transposed=transposed)


def _outputs(x, A, B, out_features, transposed, names) -> int:
    engine.check_parameter("A", A, (2,), "[a1, a2]")
    engine.check_parameter("B", B, (2,), "[b1, b2]")
    n, k = A.shape[0] * B.shape[0], A.shape[1] * B.shape[1]
    sizes = f"A {list(A.shape)} and B {list(B.shape)}"
    check_input(x, n if transposed else k, f"the {'rows' if transposed else 'columns'} of {sizes}, multiplied")
    return k if transposed else n


def kronecker_matmul_reference(x, A, B, **options):
    """`kronecker_matmul` written down in plain PyTorch, differentiated by autograd. Same arguments, same result."""
    return engine.reference("kronecker", x, A, B, **options)


engine.register("kronecker", ("A", "B"), _plain_kronecker, _outputs)
