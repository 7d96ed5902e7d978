"""laplace-torch: backends whose diagonal takes no tensor of examples times parameters.

    from taylor_kernels.integrations.laplace import TKEF, TKGGN

    la = Laplace(model, "classification", "all", "diag", backend=TKGGN)

laplace-torch forms [N, P] gradients or [N, C, P] Jacobians for N examples, C outputs and P
parameters before it squares them. Here squares are summed as gradients appear, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from taylor_kernels.integrations import absent
from taylor_kernels.parameter_fisher import ParameterFisher

try:
    from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
except ModuleNotFoundError as error:
    raise absent(error, "laplace", "laplace-torch", "0.3") from error


class TKEF(EFInterface):
    """The empirical Fisher diagonal: factor · Σ_n g_n², g_n the gradient of example n's loss.

    Losses, factors and the order of parameters are laplace-torch's: for regression the loss is the
    sum of squared errors and the factor ½, so that this is half the sum of its squared gradients,
    as with its own backends. Use `Laplace(..., hessian_structure="diag", backend=TKEF)`; `kron` is
    not offered.

    An example is what one index of dim 0 of x holds. The loss of one with several tokens ([N, T, C]
    outputs, [N, T] labels) is the sum over them.
    """

    def diag(self, x: Any, y: Tensor, N: int | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss and the diagonal of a batch.

        Args:
            x: [N, ...], or a mapping of tensors of N examples.
            y: labels [N] or [N, T], class probabilities, or targets like the output.
            N: examples of the whole data set, which a diagonal does not need.

        Returns:
            factor · loss, a scalar, and [parameters], in the order of `self.params`, or of
            `subnetwork_indices`.
        """
        _check_options(kwargs)
        return _diagonal(self, x, y, matrix="empirical")

    def kron(self, *args: Any, **kwargs: Any) -> NoReturn:
        _no_kron(self)


class TKGGN(GGNInterface):
    """The diagonal of the generalised Gauss-Newton matrix, Σ_n diag(J_nᵀ H_n J_n).

    J_n is the Jacobian of example n's outputs, H_n the Hessian of ½·MSELoss or CrossEntropyLoss,
    both summed (Schraudolph 2002). It is exact, and takes one backward pass for each column of a
    square root of H_n: C − 1 for C classes, one for each number that a regression puts out, times
    the tokens of an example. Use `Laplace(..., hessian_structure="diag", backend=TKGGN)`; `kron`
    is not offered.

    Args:
        stochastic: estimate it by random combinations of the columns, without bias; PyTorch's seed
            repeats them.
        num_samples: how many of them, a backward pass each.
    """

    def diag(self, x: Any, y: Tensor, N: int | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss and the diagonal of a batch; arguments and results as of `TKEF.diag`."""
        _check_options(kwargs)
        options: dict[str, Any] = {}
        if self.stochastic:
            seed = int(torch.randint(2**31, ()))
            options = {"samples": self.num_samples, "seed": seed}
        return _diagonal(self, x, y, matrix="gauss_newton", **options)

    def kron(self, *args: Any, **kwargs: Any) -> NoReturn:
        _no_kron(self)


def _diagonal(
    interface: CurvatureInterface, x: Any, y: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    losses: list[Tensor] = []

    def closure() -> Tensor:
        loss = interface.lossfunc(*_rows(interface, interface.model(x), y))
        losses.append(loss.detach())
        return loss

    wanted = _wanted(interface)
    squares: dict[str, Tensor] = {}
    if wanted:
        with _trained_alone(interface.model, wanted.values()):
            names = [escape(name) for name in wanted]
            fisher = ParameterFisher(interface.model, parameters=names, reduction="sum", **options)
            try:
                fisher.update(closure=closure)
                _check_examples(interface, x, fisher.examples)
                squares = fisher.sum()
            finally:
                fisher.close()
    else:
        with torch.no_grad():
            closure()
    flat = _flat(interface, {wanted[name]: found for name, found in squares.items()})
    return interface.factor * losses[0], flat.mul_(interface.factor)


def _rows(interface: CurvatureInterface, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Output and target as the loss takes them: classes come last, one row for each label."""
    if interface.likelihood == "regression" or (f.dim() == 2 and y.dim() == 1):
        return f, y
    if y.is_floating_point() and y.shape == f.shape:
        return f.reshape(-1, f.size(-1)), y.reshape(-1, f.size(-1))
    if y.numel() * f.size(-1) == f.numel():
        return f.reshape(-1, f.size(-1)), y.reshape(-1)
    return f, y  # classes are dim 1, as of images


def _wanted(interface: CurvatureInterface) -> dict[str, nn.Parameter]:
    """Parameters that any index asks for, by their names in the whole model."""
    indices = interface.subnetwork_indices
    own = {id(parameter) for parameter in interface.params}
    if indices is not None:
        ends = torch.tensor([p.numel() for p in interface.params]).cumsum(0)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < int(ends[-1]):
            raise IndexError(
                f"subnetwork_indices: reach from {int(indices.min())} to {int(indices.max())}; "
                f"there are {int(ends[-1])} parameters"
            )
        hit = torch.searchsorted(ends, indices.cpu(), right=True).unique().tolist()
        own = {id(interface.params[i]) for i in hit}
    return {name: p for name, p in interface.model.named_parameters() if id(p) in own}


def _flat(interface: CurvatureInterface, squares: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """[parameters]: in the order of `params`, or of the indices into that."""
    known = {id(parameter): found for parameter, found in squares.items()}
    parts = [
        known[id(p)].reshape(-1) if id(p) in known else torch.zeros_like(p).reshape(-1).detach()
        for p in interface.params
    ]
    flat = torch.cat(parts)
    indices = interface.subnetwork_indices
    return flat if indices is None else flat[indices]


@contextmanager
def _trained_alone(model: nn.Module, parameters: Any) -> Iterator[None]:
    """No graph is built before the first of them is used, as of features before a last layer."""
    chosen = {id(parameter) for parameter in parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _check_examples(interface: CurvatureInterface, x: Any, found: int) -> None:
    if not isinstance(x, Mapping) or interface.dict_key_x not in x:
        return
    size = len(x[interface.dict_key_x])
    if size != found:
        raise ValueError(
            f"x: its first tensor has {found} along dim 0, x[{interface.dict_key_x!r}] {size}; "
            "put one first whose dim 0 counts examples"
        )


def _check_options(options: Mapping[str, Any]) -> None:
    if options:
        raise TypeError(
            f"{', '.join(options)}: unknown here; asdl_fisher_kwargs are for backends of ASDL, "
            "backend_kwargs for this one"
        )


def _no_kron(interface: CurvatureInterface) -> NoReturn:
    raise NotImplementedError(
        f"hessian_structure: {type(interface).__name__} has 'diag' and 'full'; for 'kron' take a "
        "backend of laplace-torch"
    )
