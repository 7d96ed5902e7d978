"""The diagonal of the Fisher matrix over every parameter of a model, per example, streamed."""

from taylor_kernels.parameter_fisher.meter import ParameterFisher

__all__ = ["ParameterFisher"]
